"""The checks that all exports share: of the model before it is written, of the logits after."""

from __future__ import annotations

import types
from typing import Any, NamedTuple

import numpy as np

from tscnc_tf import _checks, _probe, _reports, inspection
from tscnc_tf.export import readiness


class Checked(NamedTuple):
    """A model that may be written, and what the written one is compared with.

    Attributes:
        library: the Keras that it is made of.
        stripped: the model with its masks applied, and without pruning wrappers and gates.
        weights: its zeros.
        ideal_sparse_bytes: what the weights would take in the sparse format best for each.
        expected_sparsity: what the zeros were held to, or None.
        specs: its inputs as TensorSpecs, for any number of examples.
        batch: the probe, of the structure of `specs`.
        logits: the outputs for the probe, a flat list.
        tolerance: how far the logits of the written model may be from them.
    """

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


def check(model: Any, expected_sparsity: float | None, probe: Any) -> Checked:
    """Apply a model's masks, strip it, and return what an export needs.

    Raises:
        TypeError, ValueError, RuntimeError: see `export_saved_model`.
    """
    if expected_sparsity is not None:
        expected_sparsity = _checks.sparsity("expected_sparsity", expected_sparsity)
    library = readiness.require_exportable(model)
    specs, batch = _probe.prepare(model, probe)
    with readiness.scope(model):
        readiness.require_finite(model)
        stripped = readiness.strip(model)
        weights = inspection.sparsity(model)
        ideal = inspection.sizes(model, gzip=False).ideal_sparse_bytes
        if expected_sparsity is not None:
            readiness.require_sparsity(weights, expected_sparsity)
        logits = _probe.outputs(lambda x: stripped(x, training=False), batch)
        allowed = _probe.tolerance(stripped, logits, float32=1e-4)
        if stripped is not model:
            before = _probe.outputs(lambda x: model(x, training=False), batch)
            require_same("the model with its pruning wrappers or gates", before, logits, allowed)
    return Checked(
        library, stripped, weights, ideal, expected_sparsity, specs, batch, logits, allowed
    )


def require_same(
    what: str, left: list[np.ndarray], right: list[np.ndarray], allowed: float
) -> float:
    """Return how far two lists of logits are apart; raise a ValueError if that is too far."""
    apart = _probe.difference(left, right)
    if apart > allowed:
        raise ValueError(
            f"On the probe batch, the logits of {what} differ from those of the stripped model by "
            f"up to {apart:.3g}, and {allowed:.3g} is allowed. A layer that is random in inference "
            "mode, keeps a state between calls, or reads Python variables would do this."
        )
    return apart


def versions(library: types.ModuleType, *distributions: str) -> dict[str, str]:
    """Return the versions of what made an export, with those of further distributions."""
    return _reports.versions("tscnc_tf", "tensorflow", library.__name__, "numpy", *distributions)
