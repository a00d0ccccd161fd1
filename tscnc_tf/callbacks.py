"""Callbacks for `fit`: all that pruning needs, and a logger of what it does to the kernels."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, inspection
from tscnc_tf._keras import tf_keras, wrappers

__all__ = ["ConditionFeed", "KernelLogger", "MaskWeights", "pruning_callbacks"]


def pruning_callbacks(
    *, condition_frequency: int = 100, log_dir: str | None = None, log_kernels: bool = False
) -> list[Any]:
    """Return all that pruning needs in `fit(..., callbacks=...)`.

    That is tfmot's `UpdatePruningStep` (without which its wrappers refuse to train), `MaskWeights`,
    `ConditionFeed` for the schedules that ask for it, and on request a `KernelLogger`.

    They are safe for a model that is not pruned: then they do nothing. In a plain `fit`, which is
    not that of `AdversarialTraining`, give them before the callbacks that write checkpoints.

    Args:
        condition_frequency: see `ConditionFeed`.
        log_dir: a folder for TensorBoard, see `KernelLogger`; implies `log_kernels`.
        log_kernels: whether to log sparsity and condition numbers after each epoch.

    Raises:
        TypeError, ValueError: an argument is not as described.
        ImportError: `log_dir` is given and TensorBoard is not installed.

    Example:
        >>> import tscnc_tf as tscnc
        >>> callbacks = tscnc.callbacks.pruning_callbacks(log_kernels=True)
    """
    callbacks = [
        _keras.tfmot().sparsity.keras.UpdatePruningStep(),
        MaskWeights(),
        ConditionFeed(_checks.integer("condition_frequency", condition_frequency, minimum=1)),
    ]
    if log_kernels or log_dir is not None:
        callbacks.append(KernelLogger(log_dir=log_dir))
    return callbacks


class MaskWeights(tf_keras.callbacks.Callback):
    """Apply the pruning masks after every batch, so that a checkpoint holds the zeros of its masks.

    tfmot applies a mask in the next forward pass, and so leaves the weights dense after each
    optimizer step. Give this callback before those that write checkpoints. (`AdversarialTraining`
    masks inside its step already; for it, what counts is the end of training, where Keras puts the
    averages of an optimizer with `use_ema=True` in place of the weights.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._apply: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Compile the masking for this model, and mask what it begins with."""
        if not wrappers.wrapped_layers(self.model):
            self._apply = None
            return
        model = self.model
        self._apply = tf.function(lambda: wrappers.apply_masks(model, model.optimizer))
        self._apply()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Mask what the optimizer step filled in."""
        if self._apply is not None:
            self._apply()

    def on_train_end(self, logs: Any = None) -> None:
        """Mask once more: Keras may have put averaged weights in place."""
        if self._apply is not None:
            self._apply()


class ConditionFeed(tf_keras.callbacks.Callback):
    """Measure condition numbers for the `ConditionGated` schedules of a model.

    Each such schedule is told the largest condition number among the masked kernels that it
    governs: when training begins, then every `frequency` optimizer steps, by NumPy's SVD in
    float64. Equal schedules count as one, also where a model that was saved and loaded has a copy
    of it for each layer.

    Args:
        frequency: number of optimizer steps between two measurements, >= 1.
    """

    def __init__(self, frequency: int = 100) -> None:
        super().__init__()
        self.frequency = _checks.integer("frequency", frequency, minimum=1)
        self._governed: dict[Any, list[Any]] = {}
        self._measured_at = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the gated schedules, and measure for the first time."""
        self._governed = {}
        wrapped = wrappers.wrapped_layers(self.model)
        if not wrapped:
            return
        from tscnc_tf import schedules  # imports tfmot, as a model with wrappers has done already

        for wrapper in wrapped:
            if isinstance(wrapper.pruning_schedule, schedules.ConditionGated):
                self._governed.setdefault(wrapper.pruning_schedule, []).append(wrapper)
        if self._governed:
            self._measure(self._step())

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Measure anew, if enough steps have been taken (one batch may be several steps)."""
        if self._governed and (step := self._step()) - self._measured_at >= self.frequency:
            self._measure(step)

    def _step(self) -> int:
        wrapper = next(iter(self._governed.values()))[0]
        return int(tf_keras.backend.get_value(wrapper.pruning_step))

    def _measure(self, step: int) -> None:
        self._measured_at = step
        for schedule, wrapped in self._governed.items():
            reports = [inspection.condition_numbers(wrapper) for wrapper in wrapped]
            worst = max(getattr(row, schedule.measure) for report in reports for row in report.rows)
            for copy in {id(wrapper.pruning_schedule): wrapper for wrapper in wrapped}.values():
                copy.pruning_schedule.update(worst, step)


class KernelLogger(tf_keras.callbacks.Callback):
    """Log sparsity and condition number of every kernel after each epoch.

    They appear in Keras' logs and history as `sparsity`, `condition_number` (the worst), and
    `sparsity/NAME`, `condition_number/NAME` for each kernel; infinite condition numbers as such.

    Args:
        log_dir: a folder to which the same scalars are written for TensorBoard, None for none.

    Raises:
        ImportError: `log_dir` is given and TensorBoard is not installed.
    """

    def __init__(self, log_dir: str | None = None) -> None:
        super().__init__()
        self._writer = None
        if log_dir is not None:
            if importlib.util.find_spec("tensorboard") is None:
                raise ImportError(
                    f"log_dir={log_dir!r} needs TensorBoard: pip install tensorboard, "
                    "or leave it out."
                )
            self._writer = tf.summary.create_file_writer(str(log_dir))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measure the kernels, and add the figures to the logs."""
        scalars = self.scalars()
        if logs is not None:
            logs.update(scalars)
        if self._writer is not None:
            with self._writer.as_default(step=epoch):
                for name, value in scalars.items():
                    tf.summary.scalar(name, value)
            self._writer.flush()

    def scalars(self) -> dict[str, float]:
        """Return the figures of the model as it is now."""
        zeros = inspection.sparsity(self.model)
        conditions = inspection.condition_numbers(self.model)
        scalars = {
            "sparsity": zeros.sparsity,
            "condition_number": max((r.condition_number for r in conditions.rows), default=np.nan),
        }
        scalars |= {f"sparsity/{row.name}": row.sparsity for row in zeros.rows}
        scalars |= {f"condition_number/{r.name}": r.condition_number for r in conditions.rows}
        return {name: float(value) for name, value in scalars.items()}

    def on_train_end(self, logs: Any = None) -> None:
        """Close TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
