"""Whether zeros make a model faster: layers timed with zeros, without, and as sparse products."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _probe, _reports, _timing
from tscnc_tf._keras import flavours, gated, wrappers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._timing import Timed, Times, compiled
from tscnc_tf.inspection import weights
from tscnc_tf.inspection.structure import KernelStructure

_ABOUT = 1.1  # medians within this ratio, with overlapping quartiles, are about the same
_LEAST_SPARSITY = 0.5  # with fewer zeros a sparse product is much slower than the dense one
_WHAT_HELPS = (
    "What does help: tscnc.pruning.compact removes dead filters, which leaves smaller dense "
    "kernels; a runtime that knows the pattern gains by 2:4 (NVIDIA's sparse tensor cores) or by "
    "blocks (LiteRT, by tscnc.export_litert(sparse=True), which also runs 1x1 convolutions by "
    "their nonzero weights on some processors). Other zeros save bytes: tscnc.inspection.sizes."
)

# The layers that are a product with their kernel, or one with patches.
_MULTIPLIED = kernel_layers.classes("Dense", "Conv1D", "Conv2D", *kernel_layers.DEPTHWISE)


@dataclasses.dataclass(frozen=True)
class LayerSpeed(_reports.Record):
    """The times of one kernel's layer, each that of a call of a compiled function.

    Attributes:
        name: the layer's name, with that of the kernel if there are several.
        kind: the layer's class.
        shape: of the kernel.
        sparsity: the fraction of zeros in it.
        input_shape: what the layer was timed on; None if it could not be called by itself.
        structure: the patterns of the zeros.
        call: a compiled function that computes almost nothing: the cost of a call.
        as_is: the layer with its zeros.
        filled: the layer with random weights that are not zero.
        sparse: the same outputs from a sparse kernel; None if there is an obstacle.
        sparse_operation: the operation that multiplied, the fastest of those tried.
        obstacle: why there are no times, or no sparse ones.
    """

    _derived = ("zeros_ratio", "sparse_ratio", "verdict")

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    input_shape: tuple[int, ...] | None
    structure: KernelStructure
    call: Times | None = None
    as_is: Times | None = None
    filled: Times | None = None
    sparse: Times | None = None
    sparse_operation: str = ""
    obstacle: str = ""

    @property
    def zeros_ratio(self) -> float | None:
        """The median with zeros over that without: 1 where zeros change nothing."""
        return _ratio(self.as_is, self.filled)

    @property
    def sparse_ratio(self) -> float | None:
        """The median of the sparse product over that of the layer: above 1, sparse is slower."""
        return _ratio(self.sparse, self.as_is)

    @property
    def verdict(self) -> str:
        """What the figures say, in words."""
        if self.as_is is None or self.filled is None:
            return f"not timed: {self.obstacle}"
        zeros = _gain(self.as_is, self.filled) if self.sparsity else "it has no zeros"
        return f"{zeros}; {self._sparse_verdict(self.as_is)}"

    def _sparse_verdict(self, as_is: Times) -> str:
        if self.sparse is None:
            return self.obstacle
        if self.call and max(self.sparse.median, as_is.median) < 2 * self.call.median:
            return "too small to tell whether sparse would be faster: most of it is the call"
        would_be = f"sparse would be {_compared(self.sparse, as_is)}"
        if self.sparse.overlaps(as_is):
            if 1 / _ABOUT < self.sparse.median / as_is.median < _ABOUT:
                would_be = "sparse would be about as fast"
            else:
                would_be = f"too unsteady to tell: by the medians {would_be}"
        return f"{would_be} here at {100 * self.sparsity:.4g} % zeros"


@dataclasses.dataclass(frozen=True)
class SpeedReport(_reports.Report):
    """The times of a model and of its layers; `print` it for a table.

    Attributes:
        rows: one per kernel, in the model's order.
        as_is: the whole model with its zeros.
        filled: the whole model with random weights that are not zero.
        device: where it was computed, as TensorFlow names it.
        batch_size: the number of examples in each call.
        rounds: how often each time was taken.
        seed: of the inputs, and of the random weights.
    """

    _derived = ("zeros_ratio", "verdict")

    rows: tuple[LayerSpeed, ...]
    as_is: Times
    filled: Times
    device: str
    batch_size: int
    rounds: int
    seed: int

    @property
    def zeros_ratio(self) -> float:
        """The model's median with zeros over that without: 1 where zeros change nothing."""
        return self.as_is.median / self.filled.median

    @property
    def verdict(self) -> str:
        """What the figures of the whole model say, in words."""
        return _gain(self.as_is, self.filled)

    def _table(self) -> _reports.Table:
        def milliseconds(times: Times | None) -> str:
            return "–" if times is None else f"{1e3 * times.median:.3g}"

        rows = [
            (
                row.name,
                row.kind,
                _reports.percent(row.sparsity),
                *map(milliseconds, (row.as_is, row.filled, row.sparse)),
                "–" if row.sparse_ratio is None else f"{row.sparse_ratio:.2f}",
            )
            for row in self.rows
        ]
        patterns = [(row.name, ", ".join(row.structure.words)) for row in self.rows]
        return _reports.Table(
            f"Milliseconds per batch of {self.batch_size} on {self.device}, medians of "
            f"{self.rounds} rounds; and the patterns of the zeros",
            ("kernel", "layer", "zeros", "as it is", "no zeros", "sparse", "sparse/as is"),
            rows,
            ("whole model", "", "", *map(milliseconds, (self.as_is, self.filled)), "", ""),
            [
                *(f"{row.name}: {row.verdict}." for row in self.rows),
                *(f"{name}: {words}." for name, words in patterns if words),
                f"Whole model, with zeros {self.as_is}, without {self.filled}: {self.verdict}.",
                _WHAT_HELPS,
            ],
        )


def speed_check(
    model: Any, x: Any = None, *, batch_size: int = 32, rounds: int = 30, seed: int = 0
) -> SpeedReport:
    """Return how long a model and its layers take, and whether their zeros make them faster.

    In TensorFlow they don't: its dense kernels multiply zeros like other numbers. This function
    measures it on the device at hand. Each layer with a kernel is timed as it is; with random
    weights that are not zero; and as a product with a sparse kernel that gives the same outputs,
    bias and activation included, by `tf.sparse.sparse_dense_matmul` or
    `tf.raw_ops.SparseMatrixMatMul`, whichever is faster. There are such products for Dense, and, by
    the patches of the image (`tf.image.extract_patches`), for Conv1D, Conv2D and the depthwise
    ones, grouped and dilated or not. The whole model is timed in the first two ways.

    All are compiled by `tf.function` (not by XLA, which has no sparse kernels). After a warm-up
    they run in turn, A B C A B C ..., in one process. A call by itself takes a fraction of a
    millisecond, so layers that take about as long can't be compared. Layers get normally
    distributed inputs, of the shape of their first call in the model.

    During the timing the model's kernels are replaced, so don't use the model from another thread.
    They are restored exactly, also after an error. Masks are applied, as by any call.

    Args:
        model: a built Keras 3 or tf_keras model, with or without pruning wrappers.
        x: a batch of inputs in the structure that the model takes, cut or repeated to
            `batch_size`. None draws floats from U[0, 1), of the model's input shape.
        batch_size: the number of examples in a call; results depend on it.
        rounds: the number of timed rounds.
        seed: the seed of all random inputs and weights.

    Returns:
        A `SpeedReport`; `print` it for a table. Times differ from run to run: compare those of one
        report only.

    Raises:
        TypeError: `model` is not a Keras model, or an argument is of a wrong type.
        ValueError: it is not built, has gates or no kernels, an argument is out of range, or `x` is
            needed, because the shape of the inputs isn't known or they are not floats.

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
    gated.require_none(model, "speed_check")
    batch_size = _checks.integer("batch_size", batch_size, minimum=1)
    rounds = _checks.integer("rounds", rounds, minimum=1)
    seed = _checks.seed("seed", seed)
    if x is None:
        x = _probe.draw(model, batch_size, seed=seed, name="x")
    _, arrays = _probe.prepare(model, x, "x")
    batch = tf.nest.map_structure(
        lambda array: tf.constant(array[np.arange(batch_size) % len(array)]), arrays
    )
    network = _keras.inference(model)  # applies the masks
    found = weights.kernels(model)
    if not found:
        raise ValueError(f"model {model.name!r} has no kernels: there are no layers to time.")
    shapes = _input_shapes([weight.kernel.layer for weight in found], lambda: network(batch))
    measure = functools.partial(_times, model, rounds, seed)
    rows = [_layer_speed(w, shapes.get(id(w.kernel.layer)), seed, measure) for w in found]
    variables = [weight.variable for weight in (*found, *weights.others(model))]
    masks = [mask for _, mask in wrappers.pruned_variables(model)]
    run = compiled(network, batch)
    times = measure({"as_is": run}, variables, masks)
    device = _timing.device(tf.nest.flatten(run())[0])
    return SpeedReport(
        tuple(rows), times["as_is"], times["filled"], device, batch_size, rounds, seed
    )


def _layer_speed(
    weight: weights.KernelWeight,
    input_shape: tuple[int, ...] | None,
    seed: int,
    measure: Callable[..., dict[str, Times]],
) -> LayerSpeed:
    """Return the times of the layer of a kernel, on inputs of a shape."""
    layer, operation = weight.kernel.layer, ""
    times: dict[str, Times] = {}
    obstacle = "it is not called with one tensor of known shape"
    if input_shape is not None:
        x = tf.cast(tf.random.stateless_normal(input_shape, (seed, 0)), layer.compute_dtype)
        runs = {"call": compiled(lambda batch: batch[:1], x), "as_is": compiled(layer, x)}
        operation, sparse, obstacle = _fastest_product(weight, x, runs["as_is"]())
        if sparse is not None:
            runs["sparse"] = sparse
        times = measure(runs, [weight.variable])
    return LayerSpeed(
        name=weight.name,
        kind=type(layer).__name__,
        shape=weight.values.shape,
        sparsity=float(np.mean(weight.values == 0)),
        input_shape=input_shape,
        structure=KernelStructure.of(weight.canonical()),
        **times,
        sparse_operation=operation,
        obstacle=obstacle,
    )


def _times(
    model: Any,
    rounds: int,
    seed: int,
    runs: dict[str, Callable[[], Any]],
    variables: list[Any],
    masks: Iterable[Any] = (),
) -> dict[str, Times]:
    """Time functions in turn, and "as_is" once more as "filled", with no zeros in the variables.

    The variables then hold random values, and the masks ones; all are restored at the end.
    """
    generator = np.random.default_rng(seed)
    changed = [*variables, *masks]
    originals = [np.array(tf.convert_to_tensor(variable)) for variable in changed]
    filled = [np.ones_like(original) for original in originals]
    for values in filled[: len(variables)]:
        if np.issubdtype(values.dtype, np.integer):  # quantized; a byte may hold two int4
            values[...] = 0x11 * generator.integers(1, 8, values.shape)
            continue
        scale = (values.size / values.shape[-1]) ** -0.5  # keeps the size of the signal
        values[...] = scale * generator.standard_normal(values.shape)
        values[values == 0] = scale

    def assign(values: list[np.ndarray]) -> None:
        with flavours.scope(model):
            for variable, value in zip(changed, values, strict=True):
                variable.assign(value)

    timed = {name: Timed(run) for name, run in runs.items()}
    timed["as_is"] = Timed(runs["as_is"], lambda: assign(originals))
    timed["filled"] = Timed(runs["as_is"], lambda: assign(filled))
    try:
        seconds = _timing.interleaved(timed, rounds)
    finally:
        assign(originals)
    return {name: Times.of(each) for name, each in seconds.items()}


def _fastest_product(
    weight: weights.KernelWeight, x: tf.Tensor, expected: tf.Tensor
) -> tuple[str, Callable[[], Any] | None, str]:
    """Return the fastest sparse product as (operation, function, ""), or ("", None, obstacle).

    Each product is compared with the layer's output first, as a layer may compute something else.
    """
    if obstacle := _obstacle(weight):
        return "", None, obstacle
    allowed = 1e-2 if x.dtype in (tf.float32, tf.float64) else 1e-1  # a GPU rounds to 10 bits
    allowed *= max(1.0, float(tf.reduce_max(tf.abs(expected))))
    found: dict[float, tuple[str, Callable[[], Any]]] = {}
    for name, function in _products(weight).items():
        try:
            run = compiled(function, x)
            if not float(tf.reduce_max(tf.abs(run() - expected))) <= allowed:
                kind = type(weight.kernel.layer).__name__
                return "", None, f"{kind} does not compute the product with its kernel"
            found[_timing.fastest_call(run)] = name, run
        except tf.errors.OpError as error:  # no such operation for this device, or no memory
            obstacle = f"{name} fails here: {type(error).__name__}"
    return (*found[min(found)], "") if found else ("", None, obstacle)


def _obstacle(weight: weights.KernelWeight) -> str:
    """Return why a kernel's layer has no sparse product to compare with, or an empty text."""
    layer, zeros = weight.kernel.layer, float(np.mean(weight.values == 0))
    kind = f"no sparse kernel in TensorFlow for {type(layer).__name__}"
    if not isinstance(layer, _MULTIPLIED) or weight.kernel.spec.layout == "transposed":
        return kind
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return f"{kind} with channels first"
    if zeros < _LEAST_SPARSITY:
        return f"a sparse product is not tried at {100 * zeros:.3g} % zeros"
    return ""


def _products(weight: weights.KernelWeight) -> dict[str, Callable[[tf.Tensor], tf.Tensor]]:
    """Return functions that compute a layer's output, by the operation that multiplies.

    A convolution becomes a product of two matrices, its kernel and the patches of the image. A
    grouped or depthwise kernel becomes a block diagonal matrix.

    Args:
        weight: the kernel of a layer without an `_obstacle`.
    """
    layer = weight.kernel.layer
    dtype = tf.as_dtype(layer.compute_dtype)
    matrix = _sparse_matrix(weight.canonical(), dtype)
    multiply: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
        "tf.sparse.sparse_dense_matmul": lambda rows: tf.transpose(
            tf.sparse.sparse_dense_matmul(matrix, rows, adjoint_b=True)
        )
    }
    if dtype in (tf.float32, tf.float64):  # the only ones that it takes
        # A function's result keeps its shape when a graph captures it. The concrete one:
        # `tf.function` warns of many that are compiled at one place.
        parts = {name: getattr(matrix, name) for name in ("indices", "values", "dense_shape")}
        convert = tf.function(
            lambda: tf.raw_ops.SparseTensorToCSRSparseMatrix(**parts), autograph=False
        )
        compressed = convert.get_concrete_function()()
        multiply["tf.raw_ops.SparseMatrixMatMul"] = lambda rows: tf.raw_ops.SparseMatrixMatMul(
            a=compressed, b=rows, transpose_b=True, transpose_output=True
        )

    def compute(product: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor) -> tf.Tensor:
        inputs = _patches(layer, x) if weight.values.ndim > 2 else x
        outputs = product(tf.reshape(inputs, (-1, inputs.shape[-1])))
        outputs = tf.reshape(outputs, (*inputs.shape[:-1], matrix.shape[0]))
        if layer.use_bias:
            outputs = tf.nn.bias_add(outputs, tf.cast(layer.bias, dtype))
        return outputs if layer.activation is None else layer.activation(outputs)

    return {name: functools.partial(compute, product) for name, product in multiply.items()}


def _sparse_matrix(kernel: np.ndarray, dtype: tf.DType) -> tf.SparseTensor:
    """Return `(groups, positions, inputs, outputs)` as a matrix (all outputs × all inputs)."""
    groups, positions, inputs, outputs = kernel.shape
    kernel = kernel.transpose(0, 3, 1, 2)  # whose order is that of the rows and columns
    group, output, position, channel = where = np.nonzero(kernel)
    row, column = group * outputs + output, (position * groups + group) * inputs + channel
    return tf.SparseTensor(
        np.stack([row, column], axis=1),
        tf.cast(kernel[where], dtype),
        (groups * outputs, positions * groups * inputs),
    )


def _patches(layer: Any, x: tf.Tensor) -> tf.Tensor:
    """Return the patches `(batch, *positions, patch)` that a convolution multiplies."""
    sizes, strides, rates = layer.kernel_size, layer.strides, layer.dilation_rate
    is_1d = len(sizes) == 1
    if is_1d:
        if layer.padding == "causal":
            x = tf.pad(x, ((0, 0), ((sizes[0] - 1) * rates[0], 0), (0, 0)))
        x = x[:, tf.newaxis]
        sizes, strides, rates = ((1, *number) for number in (sizes, strides, rates))
    if tuple(sizes) == (1, 1):
        patches = x[:, :: strides[0], :: strides[1]]
    else:
        padding = "SAME" if layer.padding == "same" else "VALID"
        patches = tf.image.extract_patches(
            x, (1, *sizes, 1), (1, *strides, 1), (1, *rates, 1), padding
        )
    return tf.squeeze(patches, axis=1) if is_1d else patches


def _input_shapes(layers: Iterable[Any], run: Callable[[], Any]) -> dict[int, tuple[int, ...]]:
    """Run a model once, and return the shape of the first input of each layer, by its id.

    Layers that were not called, or with more than one tensor, are left out.
    """
    shapes: dict[int, tuple[int, ...]] = {}

    def recorded(layer: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        leaves = [leaf for leaf in tf.nest.flatten((args, kwargs)) if tf.is_tensor(leaf)]
        if len(leaves) == 1 and leaves[0].shape.is_fully_defined():
            shapes.setdefault(id(layer), tuple(leaves[0].shape))
        return call(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for layer in {id(layer): layer for layer in layers}.values():
            attributes = vars(layer)  # written to directly: Keras tracks what is set
            name = "quantized_call" if getattr(layer, "quantization_mode", None) else "call"
            own = {name: attributes[name]} if name in attributes else {}
            stack.callback(attributes.update, own)
            stack.callback(attributes.pop, name)
            attributes[name] = functools.partial(recorded, layer, getattr(layer, name))
        run()
    return shapes


def _ratio(above: Times | None, below: Times | None) -> float | None:
    return above.median / below.median if above and below else None


def _compared(one: Times, other: Times) -> str:
    ratio = one.median / other.median
    return f"{ratio:.2g}x slower" if ratio >= 1 else f"{1 / ratio:.2g}x faster"


def _gain(as_is: Times, filled: Times) -> str:
    if _ABOUT * as_is.median < filled.median and not as_is.overlaps(filled):
        return f"{_compared(as_is, filled)} than without zeros"
    return "no faster: dense kernels multiply zeros at the same speed"
