"""Callbacks for `fit`: those that pruning needs, and loggers of kernels and gates."""

from __future__ import annotations

import abc
import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, _reports, gates, inspection
from tscnc_tf._keras import flavours, gated, masks, optimizers, tf_keras, wrappers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf.functional import scheduling

__all__ = [
    "ConditionFeed",
    "GateLogger",
    "KernelLogger",
    "RaiseOnNaN",
    "UpdatePruning",
    "pruning_callbacks",
]


def pruning_callbacks(
    *, condition_frequency: int = 100, log_dir: str | None = None, log_kernels: bool = False
) -> list[Any]:
    """Return all that pruning needs in `fit(..., callbacks=...)`.

    That is `UpdatePruning`, `ConditionFeed` for the schedules that ask for it, and on request a
    `KernelLogger`. They serve both Kerases and both engines, and are safe for a model that is not
    pruned: then they do nothing. Give them before the callbacks that write checkpoints. Where the
    pruned model is a part of another one, give them after those that put weights in place when
    training ends, as `EarlyStopping(restore_best_weights=True)` does: what they put is masked then.

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
    log_kernels = _checks.boolean("log_kernels", log_kernels)
    callbacks = [
        UpdatePruning(),
        ConditionFeed(_checks.integer("condition_frequency", condition_frequency, minimum=1)),
    ]
    if log_kernels or log_dir is not None:
        callbacks.append(KernelLogger(log_dir=log_dir))
    return callbacks


class UpdatePruning(flavours.Callback):
    """Prune in `fit`, whichever engine does it; and say if training is too short for it.

    A model with a `Pruner` prunes in its training step already. This callback prunes where another
    step runs: for a model inside another one. Likewise it lets the optimizer of the other one train
    the scores of a `ScorePruner`.

    A model in tfmot's wrappers needs it. It does what tfmot's `UpdatePruningStep` does, without
    which the wrappers refuse to train, and applies the masks after every batch: tfmot applies them
    in the next forward pass only, and so leaves the weights dense after each optimizer step. Give
    this callback before those that write checkpoints. (`AdversarialTraining` masks inside its step;
    for it, what counts is the end of training, where Keras puts the averages of an optimizer with
    `use_ema=True` in place of the weights.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._tfmots: Any = None
        self._apply: Any = None
        self._pruners: list[Any] = []
        self._steps: dict[Any, tuple[Any, Callable[[], None]]] = {}
        self._training = contextlib.ExitStack()
        self._ahead = False

    def on_train_begin(self, logs: Any = None) -> None:
        """See how the model is pruned, and mask what it begins with."""
        model = self.model
        self._training.close()  # where the last training broke off
        self._find_pruners()
        wrapped = wrappers.wrapped_layers(model)
        self._tfmots = self._apply = None
        if wrapped:
            self._tfmots = _keras.tfmot().sparsity.keras.UpdatePruningStep()
            self._tfmots.set_model(model)
            self._tfmots.on_train_begin(logs)
            self._apply = tf.function(
                lambda: wrappers.apply_masks(model, model.optimizer), autograph=False
            )
            self._apply()
        self._ahead = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Look ahead, in the first epoch, which may not be epoch 0.

        A callback may have pruned the model, or stripped it, since the last epoch.

        Warns:
            UserWarning: in the number of steps that is planned, the last renewal of the masks comes
                before the schedule has reached its final sparsity, or no weight changes places by
                the pruner's regrowth.
        """
        if not (self.params or {}).get("steps"):
            for pruner in self._pruners:
                pruner.skip_steps(self._optimizer_of(pruner))
        self._find_pruners()
        if self._ahead:
            self._ahead = False
            self._look_ahead(epoch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Mask what the optimizer step filled in."""
        if self._apply is not None:
            self._apply()
        if not all(pruner.is_attached for pruner in self._pruners):
            self._find_pruners()
        for pruner in self._pruners:
            optimizer, step = self._step_of(pruner)
            if pruner.is_behind(optimizer):
                step()

    def _find_pruners(self) -> None:
        """Find the pruners of the model, and let it compile its steps again where one is new.

        The steps may have been compiled before the model was pruned, stripped or frozen.
        """
        found = masks.pruners(self.model)
        flavours.register_trainer(self.model, *(pruner.model for pruner in found))
        if any(pruner not in self._pruners for pruner in found):
            held = optimizers.held(self.model)
            self._training.enter_context(masks.training(self.model, *held))
        self._pruners = found
        self._steps = {}

    def _step_of(self, pruner: Any) -> tuple[Any, Callable[[], None]]:
        """Return the optimizer that trains the weights of a pruner, and the step to take after it.

        Both are kept until the next epoch, or until the model holds another optimizer.
        """
        known = self._steps.get(pruner)
        if known and any(each is known[0] for each in optimizers.held(self.model)):
            return known
        optimizer = self._optimizer_of(pruner)
        step = optimizer, pruner.step_function(optimizer)
        if optimizers.trains(optimizer, [target.variable for target in pruner.targets]):
            self._steps[pruner] = step
        return step

    def _optimizer_of(self, pruner: Any) -> Any:
        """Return the optimizer that trains the weights of a pruner."""
        variables = [target.variable for target in pruner.targets]
        own = optimizers.trainer_of(self.model, variables)
        return self.model.optimizer if own is None else own

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Do what tfmot does at the end of an epoch."""
        if self._tfmots is not None:
            self._tfmots.on_epoch_end(epoch, logs)

    def on_train_end(self, logs: Any = None) -> None:
        """Mask once more: Keras may have put averaged weights in place."""
        self._training.close()
        masks.apply(self.model, self.model.optimizer)

    def _look_ahead(self, epoch: int) -> None:
        """Warn of schedules that training as planned will leave before their end."""
        params = self.params or {}
        if not params.get("epochs") or not params.get("steps"):
            return
        planned = (params["epochs"] - epoch) * params["steps"]
        planned //= getattr(self.model.optimizer, "gradient_accumulation_steps", None) or 1
        progress = [(p.schedule, p.steps) for p in self._pruners if not p.frozen]
        wrapped = {id(w.pruning_schedule): w for w in wrappers.wrapped_layers(self.model)}
        for wrapper in wrapped.values():
            done = int(tf_keras.backend.get_value(wrapper.pruning_step))
            progress.append((wrapper.pruning_schedule, max(done, 0)))
        for schedule, done in progress:
            final = scheduling.final_sparsity(schedule)
            last = done + planned
            known = scheduling.renewals(schedule, last)
            if known is None:
                continue
            step, sparsity = known[-1] if known else (0, 0.0)
            if sparsity < final - 1e-6:
                warnings.warn(
                    f"{schedule!r} does not reach its sparsity of {final:g} in the training "
                    f"planned, steps {done + 1} to {last}: the last renewal of the masks is at "
                    f"step {step}, to {sparsity:.4g}. Train longer, let the schedule end earlier "
                    "or renew more often, or force it in the end by the pruner's finalize().",
                    UserWarning,
                    stacklevel=2,
                )
        for pruner in self._pruners:
            first = pruner.regrowth and pruner.regrowth.first_move(pruner.schedule)
            if not pruner.frozen and first and first > pruner.steps + planned:
                warnings.warn(
                    f"{pruner.regrowth!r} moves no weight in the training planned, steps "
                    f"{pruner.steps + 1} to {pruner.steps + planned}: the first move is at step "
                    f"{first}. Train longer, or take a smaller frequency.",
                    UserWarning,
                    stacklevel=2,
                )


class ConditionFeed(flavours.Callback):
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
        self._governed: dict[Any, list[_Governed]] = {}
        self._measured_at = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the gated schedules, and measure for the first time."""
        self._governed = {}
        found = []
        for wrapper in wrappers.wrapped_layers(self.model):
            step = functools.partial(tf_keras.backend.get_value, wrapper.pruning_step)
            found.append(_Governed(wrapper.pruning_schedule, wrapper, step))
        gated_around = gated.owners(self.model)
        pruners = masks.pruners(self.model)
        for pruner in pruners:
            step = functools.partial(getattr, pruner, "steps")
            layers = {id(target.layer): target.layer for target, _ in pruner.masked_targets()}
            for layer in layers.values():
                if any(kernel_layers.kernels(layer)):
                    acting = gated_around.get(id(layer), layer)
                    found.append(_Governed(pruner.schedule, acting, step))
        if not found and not pruners:
            return
        from tscnc_tf import schedules  # imports tfmot, where it is installed

        for governed in found:
            if isinstance(governed.schedule, schedules.ConditionGated):
                self._governed.setdefault(governed.schedule, []).append(governed)
        for pruner in pruners:
            schedule = pruner.schedule
            if isinstance(schedule, schedules.ConditionGated) and schedule not in self._governed:
                warnings.warn(
                    f"{schedule!r} governs no weight that is read as a matrix, so that its gate "
                    "stays open: it has no condition number to go by. Prune these layers by "
                    "another schedule, or kernels of dense layers and convolutions with them.",
                    UserWarning,
                    stacklevel=2,
                )
        if self._governed:
            self._measure(self._step())

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Measure anew, if enough steps have been taken (one batch may be several steps)."""
        if self._governed and (step := self._step()) - self._measured_at >= self.frequency:
            self._measure(step)

    def _step(self) -> int:
        return int(next(iter(self._governed.values()))[0].step())

    def _measure(self, step: int) -> None:
        self._measured_at = step
        for schedule, governed in self._governed.items():
            reports = [inspection.condition_numbers(each.layer) for each in governed]
            worst = max(getattr(row, schedule.measure) for report in reports for row in report.rows)
            for copy in {id(each.schedule): each.schedule for each in governed}.values():
                copy.update(worst, step)


class RaiseOnNaN(flavours.Callback):
    """Raise an error in the step in which a figure of the logs, or a weight, stops being finite.

    Keras' `TerminateOnNaN` looks at the loss and ends `fit` as if all were well. A gradient that is
    not finite leaves the loss of its own step as it is and ruins the weights; this callback reads
    all of them after each step, on the device. Give it before the callbacks that write checkpoints,
    so that none is written of what it refuses.

    Args:
        first_batch: the number of the first batch, where `fit` goes on within an epoch: for the
            message.

    Raises:
        TypeError, ValueError: the number is no integer >= 0.
        ValueError: in `fit`; it names the epoch, the batch, and the figures or the weights.

    Example:
        >>> import keras, numpy as np
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(keras.optimizers.SGD(1e38), "mse")
        >>> x = np.array([[1.0], [9.0]])
        >>> watch = tscnc.callbacks.RaiseOnNaN()
        >>> model.fit(x, 9.0 * x, callbacks=[watch], verbose=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: After batch 1 of epoch 1 weights are NaN or infinite: ...
    """

    def __init__(self, first_batch: int = 0) -> None:
        super().__init__()
        self._first_batch = _checks.integer("first_batch", first_batch, minimum=0)
        self._epoch = 0
        self._names: list[str] = []
        self._are_finite: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Forget the weights of the last training."""
        self._are_finite = None

    def _find_weights(self) -> None:
        """Compile the check of the weights, which some models have after a first batch only."""
        weights = [each for each in self.model.weights if tf.as_dtype(each.dtype).is_floating]
        self._names = [getattr(each, "path", each.name).partition(":")[0] for each in weights]
        tensors = [flavours.tensor_variable(weight) for weight in weights]
        # The concrete function: `tf.function` warns of many that are compiled at one place.
        self._are_finite = tf.function(
            lambda: tf.stack([tf.reduce_all(tf.math.is_finite(each)) for each in tensors]),
            autograph=False,
        ).get_concrete_function()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Take note of the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Look at the logs and the weights."""
        if self._are_finite is None:
            self._find_weights()
        finite = self._are_finite().numpy()
        wrong = {
            name: value for name, value in (logs or {}).items() if not np.all(np.isfinite(value))
        }
        if not wrong and finite.all():
            return
        where = f"After batch {self._first_batch + batch + 1} of epoch {self._epoch + 1}"
        names = [name for name, each in zip(self._names, finite, strict=True) if not each]
        if wrong:
            what = ", ".join(f"{name} is {value}" for name, value in wrong.items())
            if names:
                what += f", and {len(names)} of {len(finite)} weights are NaN or infinite"
        else:
            what = f"weights are NaN or infinite: {', '.join(names[:5])}"
            what += f" and {len(names) - 5} others" if len(names) > 5 else ""
        raise ValueError(
            f"{where} {what}. Lower the learning rate or the factors of the penalties, or clip the "
            "gradients; then go on from the last checkpoint."
        )


class _Governed(NamedTuple):
    """A layer, or a wrapper around one, that a schedule governs; and the step that it is at."""

    schedule: Any
    layer: Any
    step: Callable[[], Any]


class _ScalarLogger(flavours.Callback, abc.ABC):
    """Base: adds the figures of `scalars` to the logs of each epoch, and to TensorBoard's."""

    def __init__(self, log_dir: str | None = None) -> None:
        super().__init__()
        self._log_dir, self._writer = log_dir, None
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                f"log_dir={log_dir!r} needs TensorBoard: pip install tensorboard, or leave it out."
            )

    def on_train_begin(self, logs: Any = None) -> None:
        """Open TensorBoard's file; a new one for each `fit`."""
        super().on_train_begin(logs)
        if self._log_dir is not None:
            self._writer = tf.summary.create_file_writer(str(self._log_dir))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measure the model, and add the figures to the logs."""
        scalars = self.scalars()
        if logs is not None:
            logs.update(scalars)
        if self._writer is not None:
            with self._writer.as_default(step=epoch):
                for name, value in scalars.items():
                    tf.summary.scalar(name, value)
            self._writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        """Close TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @abc.abstractmethod
    def scalars(self) -> dict[str, float]:
        """Return the figures of the model as it is now."""


class KernelLogger(_ScalarLogger):
    """Log sparsity and condition number of every kernel after each epoch.

    They appear in Keras' logs and history as `sparsity`, `condition_number` (the worst), and
    `sparsity/NAME`, `condition_number/NAME` for each kernel; infinite condition numbers as such,
    and NaN for the worst where no weight is read as a matrix.

    Args:
        log_dir: a folder to which the same scalars are written for TensorBoard, None for none.

    Raises:
        ImportError: `log_dir` is given and TensorBoard is not installed.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> model = tscnc.prune_now(model, 0.5)
        >>> model.compile("sgd", "mse")
        >>> logger = tscnc.callbacks.KernelLogger()
        >>> x, y = np.ones((8, 4)), np.ones((8, 3))
        >>> history = model.fit(x, y, callbacks=[logger], verbose=0).history
        >>> history["sparsity"]
        [0.5]
    """

    def scalars(self) -> dict[str, float]:
        """Return the figures of the model as it is now."""
        zeros = inspection.sparsity(self.model)
        has_kernels = any(kernel_layers.kernels(self.model))
        rows = inspection.condition_numbers(self.model).rows if has_kernels else ()
        scalars = {
            "sparsity": zeros.sparsity,
            "condition_number": max((row.condition_number for row in rows), default=np.nan),
        }
        scalars |= {f"sparsity/{row.name}": row.sparsity for row in zeros.rows}
        scalars |= {f"condition_number/{row.name}": row.condition_number for row in rows}
        return {name: float(value) for name, value in scalars.items()}


class GateLogger(_ScalarLogger):
    """Log after each epoch how many gates are open.

    They appear in Keras' logs and history as `expected_l0` (the expected number of weights whose
    gate is open in training) and `open_gates` (the share of gates above zero at inference), and as
    `expected_l0/NAME`, `open_gates/NAME` for each gated layer. See `gates.report`.

    Args:
        log_dir: a folder to which the same scalars are written for TensorBoard, None for none.

    Raises:
        ImportError: `log_dir` is given and TensorBoard is not installed.

    Example:
        >>> import keras
        >>> import numpy as np
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> model = tscnc.gates.add_gates(model)
        >>> model.compile("sgd", "mse")
        >>> logger = tscnc.callbacks.GateLogger()
        >>> x, y = np.ones((8, 4)), np.ones((8, 3))
        >>> history = model.fit(x, y, callbacks=[logger], verbose=0).history
        >>> history["open_gates"]
        [1.0]

    Reference:
        Louizos, Welling & Kingma 2018, arXiv 1712.01312, equation 12, for the expected L0.
    """

    def scalars(self) -> dict[str, float]:
        """Return the figures of the model as it is now."""
        report = gates.report(self.model)
        names = _reports.unique(row.name for row in report.rows)
        scalars = {"expected_l0": report.expected_l0, "open_gates": report.open_share}
        for name, row in zip(names, report.rows, strict=True):
            scalars[f"expected_l0/{name}"] = row.expected_l0
            scalars[f"open_gates/{name}"] = row.open_share
        return scalars
