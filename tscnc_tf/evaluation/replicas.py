"""The replicas of a distribution strategy, over which batches are distributed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf


class Replicas:
    """The devices on which batches are attacked: those of a `MirroredStrategy`, or the default one.

    The strategy is that of the current scope, else the one that the model was built under. Each
    device reads its own copy of the model's variables. The result for a batch depends only on its
    index, so the results are those of one device, except for the rounding of different devices.

    Args:
        model: the evaluated model.
    """

    def __init__(self, model: Any) -> None:
        strategy: Any = getattr(model, "distribute_strategy", None)
        if tf.distribute.has_strategy():
            strategy = tf.distribute.get_strategy()
        self._strategy = strategy
        # The devices of several workers belong to several processes.
        is_mirrored = isinstance(strategy, tf.distribute.MirroredStrategy)
        self._devices = strategy.extended.worker_devices if is_mirrored else (None,)

    def __len__(self) -> int:
        """Return the number of devices."""
        return len(self._devices)

    def map(
        self,
        make: Callable[[], Callable[..., Any]],
        batches: Iterable[tuple[Any, ...]],
        *,
        together: bool = True,
    ) -> Iterator[Any]:
        """Yield the results of a function for tuples of arguments, in order.

        Args:
            make: returns the function; called once for each replica that is needed.
            batches: the arguments, read in groups of one per replica.
            together: whether calls may run in parallel; if not, all run in this thread.
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
