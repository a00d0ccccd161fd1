"""The replicas of a distribution strategy, each of which attacks batches of its own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf


class Replicas:
    """Where batches are attacked: the devices of a `tf.distribute.MirroredStrategy`, or one place.

    The strategy is the one in whose scope this is made, else the one that the model was built
    under. Each device reads its own copy of the model's variables. What a batch comes to depends on
    its place in the order only, so the results are those of one device, but for the rounding of
    devices that differ.

    Args:
        model: what is evaluated.
    """

    def __init__(self, model: Any) -> None:
        strategy: Any = getattr(model, "distribute_strategy", None)
        if tf.distribute.has_strategy():
            strategy = tf.distribute.get_strategy()
        self._strategy = strategy
        # Those of several workers are not in one process.
        is_mirrored = isinstance(strategy, tf.distribute.MirroredStrategy)
        self._devices = strategy.extended.worker_devices if is_mirrored else (None,)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._devices)

    def map(
        self,
        make: Callable[[], Callable[..., Any]],
        batches: Iterable[tuple[Any, ...]],
        *,
        together: bool = True,
    ) -> Iterator[Any]:
        """Yield what a function returns for each tuple of arguments, in their order.

        Args:
            make: returns the function; called once for each replica that is needed.
            batches: the arguments. As many are taken in advance as there are replicas.
            together: whether several calls may run at a time; if not, all of them run here.
        """
        batches = iter(batches)
        if len(self) == 1 or not together:
            if (first := next(batches, None)) is not None:
                function = make()
                yield from itertools.starmap(function, itertools.chain([first], batches))
            return
        functions: list[Callable[..., Any]] = []
        with concurrent.futures.ThreadPoolExecutor(len(self)) as pool:
            while group := list(itertools.islice(batches, len(self))):
                while len(functions) < len(group):
                    functions.append(make())
                running = [
                    pool.submit(self._run, replica, functions[replica], arguments)
                    for replica, arguments in enumerate(group)
                ]
                for each in running:
                    yield each.result()

    def _run(self, replica: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        context = tf.distribute.ReplicaContext(self._strategy, replica)
        with contextlib.ExitStack() as stack:
            stack.enter_context(context)
            stack.enter_context(tf.device(self._devices[replica]))
            return function(*arguments)
