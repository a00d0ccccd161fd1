"""Checks of a model before it is exported, and of its logits afterwards."""

from __future__ import annotations

import types
import warnings
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _probe, _reports, gates, inspection, pruning, training
from tscnc_tf._keras import flavours, layers, masks, wrappers
from tscnc_tf.export import manifest


class Checked(NamedTuple):
    """A model that has passed the checks, with what the written one is compared with.

    Attributes:
        model: the model.
        library: its Keras, as a module.
        stripped: the model with its masks applied, without pruning wrappers and gates.
        weights: its zeros.
        ideal_sparse_bytes: the size of the weights, each in the smallest sparse format.
        expected_sparsity: the sparsity that was required, or None.
        specs: its inputs as TensorSpecs, for any number of examples.
        batch: the probe, of the structure of `specs`.
        logits: the outputs for the probe, a flat list.
        tolerance: the largest difference that an output of the written model may have, relative
            to the output's largest value (if above 1).
    """

    model: Any
    library: types.ModuleType
    stripped: Any
    weights: inspection.SparsityReport
    ideal_sparse_bytes: int
    expected_sparsity: float | None
    specs: Any
    batch: Any
    logits: list[np.ndarray]
    tolerance: float

    @property
    def examples(self) -> int:
        """The number of examples in the probe."""
        return _probe.examples(self.batch)

    def versions(self, *distributions: str) -> dict[str, str]:
        """Return the versions of the libraries behind an export, and of further distributions."""
        return _reports.versions(
            "tscnc_tf", "tensorflow", self.library.__name__, "numpy", *distributions
        )


def check(model: Any, expected_sparsity: float | None, probe: Any) -> Checked:
    """Apply a model's masks, strip it, and return what an export needs.

    Raises:
        TypeError, ValueError, RuntimeError: see `export_saved_model`.
    """
    if expected_sparsity is not None:
        expected_sparsity = _checks.sparsity("expected_sparsity", expected_sparsity)
    library = require_exportable(model)
    specs, batch = _probe.prepare(model, probe)
    with flavours.scope(model):
        require_finite(model)
        stripped = strip(model)
        weights = inspection.sparsity(model).without_paths()
        sizes = inspection.sizes(model, gzip=False)
        if expected_sparsity is not None:
            require_sparsity(weights, expected_sparsity)
        logits = _probe.outputs(lambda x: stripped(x, training=False), batch)
        tolerance = _probe.tolerance(stripped, float32=1e-4)
        _warn_if_equal(logits, tolerance)
        if stripped is not model:
            before = _probe.outputs(lambda x: model(x, training=False), batch)
            require_same("the model with its pruning wrappers or gates", before, logits, tolerance)
    return Checked(
        model=model,
        library=library,
        stripped=stripped,
        weights=weights,
        ideal_sparse_bytes=sizes.ideal_sparse_bytes,
        expected_sparsity=expected_sparsity,
        specs=specs,
        batch=batch,
        logits=logits,
        tolerance=tolerance,
    )


def _warn_if_equal(logits: list[np.ndarray], tolerance: float) -> None:
    """Warn if the logits differ so little from example to example that a check says nothing."""
    if any(not array.ndim or len(array) < 2 for array in logits):
        return
    spreads = [
        (float(np.ptp(array, axis=0).max(initial=0.0)), tolerance * _probe.scale(array))
        for array in logits
    ]
    spread, allowed = max(spreads, key=lambda pair: pair[0] / pair[1])
    if 0.0 < spread <= allowed:  # 0: mostly a constant model
        warnings.warn(
            f"The logits of the probe batch differ by at most {spread:.3g} between its examples, "
            f"and the check of the export allows a difference of {allowed:.3g}, so it says little. "
            "Pass probe=, some typical inputs.",
            stacklevel=4,
        )


def require_same(
    what: str, found: list[np.ndarray], expected: list[np.ndarray], tolerance: float
) -> tuple[float, float]:
    """Return the difference of the output that differs most, relative to it, and the allowed one.

    Raises:
        ValueError: it is above the allowed one, or the shapes differ, whatever is allowed.
    """
    shapes, wanted = ([array.shape for array in arrays] for arrays in (found, expected))
    if shapes != wanted:
        raise ValueError(
            f"On the probe batch, the logits of {what} have the shapes {shapes}, and those of the "
            f"stripped model {wanted}."
        )
    difference, scale = _probe.deviation(expected, found)
    allowed = tolerance * scale
    if difference > allowed:
        raise ValueError(
            f"On the probe batch, the logits of {what} differ from those of the stripped model by "
            f"up to {difference:.3g}, and {allowed:.3g} is allowed. Possible causes are layers "
            "that are random in inference mode, keep state between calls, or read Python variables."
        )
    return difference, allowed


def require_exportable(model: Any) -> types.ModuleType:
    """Return the Keras of a model that can be exported; raise an error for all others."""
    if tf.distribute.has_strategy():
        raise RuntimeError(
            "A model must be exported outside of strategy.scope(): the copy that is loaded to "
            "check the export would be distributed over devices. The model may be created inside."
        )
    library = _keras.library("model", model)
    if isinstance(model, training.AdversarialTraining):
        raise TypeError(
            f"model must be the network itself, got the trainer {model.name!r} around it: "
            "export trainer.model."
        )
    _keras.require_built("model", model)
    inside = [layer.name for layer in wrappers.wrapped_layers(model)]
    if inside and not _keras.is_graph_model(model):
        raise ValueError(
            f"model {model.name!r} is a subclassed model ({type(model).__name__}), so its pruning "
            f"wrappers {inside} can't be taken out. Build it as a Sequential or functional model, "
            "or put each wrapper's `.layer` in the wrapper's place yourself."
        )
    return library


def variables(model: Any) -> list[Any]:
    """Return a model's variables, without the vocabularies that tf_keras lists among them."""
    return [variable for variable in model.variables if flavours.is_variable(variable)]


def require_finite(model: Any) -> None:
    """Raise a ValueError that names the variables with NaN or infinity, if there are any."""
    bad = [_name(v) for v in variables(model) if not manifest.is_finite(v)]
    if bad:
        raise ValueError(
            f"model {model.name!r} has weights that are NaN or infinite, in {', '.join(bad)}. "
            "Restore a checkpoint from before the training diverged."
        )


def strip(model: Any) -> Any:
    """Apply a model's masks, and return it with gates folded and without wrappers, checked.

    Raises:
        ValueError: a weight under a mask is not zero, or a wrapper could not be taken out.
    """
    masks.apply(model)
    pairs = list(masks.masked_variables(model))
    for weight, mask in pairs:
        alive = np.count_nonzero((manifest.values(mask) == 0) & (manifest.values(weight) != 0))
        if alive:
            raise ValueError(f"{_name(weight)} has {alive} weights that its mask does not zero.")
    prunable = [kernel.variable for kernel in layers.kernels(model)]
    prunable += [weight for weight, _ in pairs]
    for variable in {id(variable): variable for variable in prunable}.values():
        _make_zeros_positive(variable)

    # A pruner may stay attached: it hides its masks from SavedModels.
    stripped = pruning.strip(model) if wrappers.wrapped_layers(model) else gates.fold(model)
    left = [layer.name for layer in wrappers.wrapped_layers(stripped)]
    theirs = masks.names(model)
    left += [_name(variable) for variable in variables(stripped) if id(variable) in theirs]
    if left:
        raise ValueError(
            f"model {model.name!r} still has pruning wrappers after stripping: {', '.join(left)}. "
            "They are inside a layer whose parts can't be replaced from outside: put each "
            "wrapper's `.layer` in the wrapper's place yourself."
        )
    return stripped


def require_sparsity(weights: inspection.SparsityReport, expected: float) -> None:
    """Raise a ValueError unless each weight has as many zeros as tfmot makes, in its arithmetic."""
    keep = np.float32(1) - np.float32(expected)
    short = []
    for row in weights.prunable:
        wanted = row.weights - max(int(np.round(np.float32(row.weights) * keep)), 1)
        if row.zeros < wanted:
            short.append(
                f"{row.name} has {row.zeros:,} zeros of {row.weights:,} "
                f"({_reports.percent(row.sparsity)}), {wanted:,} are needed"
            )
    if short:
        raise ValueError(
            f"expected_sparsity={expected:g} is not reached: {'; '.join(short)}. Train on to the "
            "end of the pruning schedule, or expect less."
        )


def _make_zeros_positive(variable: Any) -> None:
    """Turn -0.0, which a mask makes of a negative weight, into 0.0.

    A mixture of the two does not compress: at 90 % zeros, it makes a gzipped kernel a third larger.
    """
    values = manifest.values(variable).copy()
    negative = np.signbit(values) & (values == 0)
    if negative.any():
        values[negative] = 0
        variable.assign(values)


def _name(variable: Any) -> str:
    """Return the full name of a variable, which Keras 3 has in `path`."""
    return getattr(variable, "path", variable.name)
