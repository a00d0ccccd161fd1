"""Timing a model and its layers: as they are, without zeros, and with sparse kernels."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _timing
from tscnc_tf._keras import wrappers
from tscnc_tf._timing import Timed, Times, compiled
from tscnc_tf.inspection import weights
from tscnc_tf.inspection.speed import inputs, products
from tscnc_tf.inspection.speed.report import LayerSpeed, SpeedReport
from tscnc_tf.inspection.speed.structure import KernelStructure


def speed_check(
    model: Any, x: Any = None, *, batch_size: int = 32, rounds: int = 30, seed: int = 0
) -> SpeedReport:
    r"""Return how long a model and its layers take, and whether their zeros make them faster.

    They don't, in TensorFlow: its dense kernels multiply zeros like all else. This measures it on
    the device at hand. Each layer with a kernel is timed

    * as it is, the zeros in its dense kernel;
    * with random weights that are not zero, in the same kernel;
    * as a product with a sparse kernel that gives the same outputs, bias and activation included:
      by `tf.sparse.sparse_dense_matmul` or `tf.raw_ops.SparseMatrixMatMul`, whichever is faster. A
      convolution multiplies the patches of its image (`tf.image.extract_patches`) then. There are
      such products for Dense, Conv1D, Conv2D and the depthwise ones, grouped and dilated or not.

    and the whole model in the first two ways. All are compiled by `tf.function` (not XLA, which
    knows no sparse kernels), and run in turn, A B C A B C ..., in one process, after a warm-up;
    reported are medians and quartiles by the wall clock. A call alone takes TensorFlow a fraction
    of a millisecond, so layers of about that size can't be told apart. Layers are given normally
    distributed inputs. A layer that is called several times is timed on what it takes first.

    While it is timed, the model's kernels are exchanged, and put back bit by bit, also after an
    error; so don't use the model from another thread meanwhile. Masks are applied, as by any call.

    Args:
        model: a built Keras 3 or tf_keras model, with or without pruning wrappers.
        x: a batch of inputs in the structure that the model takes, cut or repeated to
            `batch_size`. None draws floats from U[0, 1) of the shape that the model names.
        batch_size: the number of examples in a call. 1 and 256 may tell different stories.
        rounds: how often each time is taken.
        seed: of all that is drawn.

    Returns:
        A `SpeedReport`: `print` it. `report.rows[0].verdict` is a sentence, and
        `report.rows[0].sparse_ratio` the sparse product's median over the layer's. Times differ
        from run to run; compare what stands in one report.

    Raises:
        TypeError: `model` is no Keras model, or an argument is of a wrong type.
        ValueError: it has no weights yet or no kernels, an argument is out of range, or `x` is
            needed, because the shape of the inputs isn't known or they are no floats.

    Reference:
        Gale et al. 2020, "Sparse GPU kernels for deep learning", arXiv 2006.10901; Mishra et al.
        2021, "Accelerating sparse deep neural networks", arXiv 2104.08378 (2:4).

    Example:
        >>> import numpy as np, tf_keras, tscnc_tf.inspection
        >>> model = tf_keras.Sequential([tf_keras.layers.Dense(64, input_shape=(64,), name="last")])
        >>> model.set_weights([np.eye(64), np.zeros(64)])
        >>> report = tscnc_tf.inspection.speed_check(model, batch_size=8, rounds=5)
        >>> row = report.rows[0]
        >>> row.sparse_ratio == row.sparse.median / row.as_is.median
        True
        >>> row.structure.two_of_four
        1.0
    """
    _keras.library("model", model)
    _keras.require_built("model", model)
    batch_size = _checks.integer("batch_size", batch_size, minimum=1)
    rounds = _checks.integer("rounds", rounds, minimum=1)
    seed = _checks.integer("seed", seed, minimum=0)
    batch = inputs.drawn(model, batch_size, seed) if x is None else inputs.fitted(x, batch_size)
    network = _keras.inference(model)  # applies the masks
    found = weights.kernels(model)
    if not found:
        raise ValueError(f"model {model.name!r} has no kernels: there are no layers to time.")
    shapes = inputs.input_shapes([weight.kernel.layer for weight in found], lambda: network(batch))

    rows = [
        _layer(model, weight, shapes.get(id(weight.kernel.layer)), rounds, seed) for weight in found
    ]

    others = [weight.variable for weight in weights.others(model)]
    masks = [mask for _, mask in wrappers.pruned_variables(model)]
    exchanged = [weight.variable for weight in found] + others
    whole = compiled(network, batch)
    with _Exchange(model, exchanged, seed, masks) as exchange:
        times = _interleaved(
            {
                "as is": Timed(whole, exchange.restore),
                "filled": Timed(whole, exchange.fill),
            },
            rounds,
        )
    device = _timing.device(tf.nest.flatten(whole())[0])
    return SpeedReport(
        tuple(rows), times["as is"], times["filled"], device, batch_size, rounds, seed
    )


def _layer(
    model: Any,
    weight: weights.KernelWeight,
    input_shape: tuple[int, ...] | None,
    rounds: int,
    seed: int,
) -> LayerSpeed:
    layer = weight.kernel.layer
    row = LayerSpeed(
        name=weight.name,
        kind=type(layer).__name__,
        shape=weight.values.shape,
        sparsity=float(np.mean(weight.values == 0)),
        input_shape=input_shape,
        structure=KernelStructure.of(weight.canonical()),
    )
    if input_shape is None:
        return dataclasses.replace(row, obstacle="it is not called with one tensor of known shape")
    x = tf.cast(tf.random.stateless_normal(input_shape, (seed, 0)), layer.compute_dtype)
    dense = compiled(layer, x)
    operation, sparse, obstacle = _fastest_product(weight, x, dense())
    with _Exchange(model, [weight.variable], seed) as exchange:
        functions = {
            "call": Timed(compiled(lambda batch: batch[:1], x)),
            "as_is": Timed(dense, exchange.restore),
            "filled": Timed(dense, exchange.fill),
        }
        if sparse is not None:
            functions["sparse"] = Timed(sparse)
        times = _interleaved(functions, rounds)
    return dataclasses.replace(
        row,
        call=times["call"],
        as_is=times["as_is"],
        filled=times["filled"],
        sparse=times.get("sparse"),
        sparse_operation=operation,
        obstacle=obstacle,
    )


def _fastest_product(
    weight: weights.KernelWeight, x: tf.Tensor, expected: tf.Tensor
) -> tuple[str, Callable[[], Any] | None, str]:
    """Return the fastest sparse product's operation and itself; or "", None, and why there is none.

    Each is compared with the layer's own output first: a layer may compute more than its product.
    """
    obstacle = products.obstacle(weight)
    if obstacle:
        return "", None, obstacle
    allowed = 1e-2 if x.dtype in (tf.float32, tf.float64) else 1e-1  # a GPU rounds to 10 bits
    allowed *= max(1.0, float(tf.reduce_max(tf.abs(expected))))
    seconds: dict[str, float] = {}
    functions = {}
    for name, function in products.products(weight).items():
        try:
            run = compiled(function, x)
            apart = float(tf.reduce_max(tf.abs(run() - expected)))
            if not apart <= allowed:
                kind = type(weight.kernel.layer).__name__
                return "", None, f"{kind} computes something else than the product with its kernel"
            seconds[name], functions[name] = _timing.fastest_call(run), run
        except tf.errors.OpError as error:  # no such operation for this device, or no memory
            obstacle = f"{name} fails here: {type(error).__name__}"
    if not seconds:
        return "", None, obstacle
    best = min(seconds, key=seconds.__getitem__)
    return best, functions[best], ""


class _Exchange(contextlib.AbstractContextManager["_Exchange"]):
    """Puts random weights that are not zero in the place of variables, and back at the end."""

    def __init__(
        self, model: Any, variables: Iterable[Any], seed: int, masks: Iterable[Any] = ()
    ) -> None:
        generator = np.random.default_rng(seed)
        self._strategy = getattr(model, "distribute_strategy", None)
        self._values = []
        for variable in variables:
            original = np.array(tf.convert_to_tensor(variable))
            scale = (original.size / original.shape[-1]) ** -0.5  # keeps the size of the signal
            drawn = (scale * generator.standard_normal(original.shape)).astype(original.dtype)
            drawn[drawn == 0] = scale
            self._values.append((variable, original, drawn))
        for mask in masks:
            original = np.array(tf.convert_to_tensor(mask))
            self._values.append((mask, original, np.ones_like(original)))

    def restore(self) -> None:
        """Put the original values back."""
        self._assign(1)

    def fill(self) -> None:
        """Put the random values in."""
        self._assign(2)

    def __exit__(self, *error: object) -> None:
        self.restore()

    def _assign(self, which: int) -> None:
        scope = self._strategy.scope() if self._strategy else contextlib.nullcontext()
        with scope:
            for entry in self._values:
                entry[0].assign(entry[which])


def _interleaved(functions: dict[str, Timed], rounds: int) -> dict[str, Times]:
    found = _timing.interleaved(functions, rounds)
    return {name: Times.of(seconds) for name, seconds in found.items()}
