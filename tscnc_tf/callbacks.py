"""Callbacks for `fit`: pruning, a check for NaN, and loggers of kernels and gates."""

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
    "DataPosition",
    "GateLogger",
    "KernelLogger",
    "RaiseOnNaN",
    "UpdatePruning",
    "pruning_callbacks",
]


def pruning_callbacks(
    *, condition_frequency: int = 100, log_dir: str | None = None, log_kernels: bool = False
) -> list[Any]:
    """Return the callbacks for pruning in `fit`.

    A Keras model with masks is pruned without them; tfmot's wrappers, `ConditionGated`, pruned
    parts of other models, and a `Regrowth` that follows the validation need them. They warn if
    training is too short.

    These are `UpdatePruning`, `ConditionFeed` for the schedules that need it, and on request a
    `KernelLogger`. They support both Keras versions and both engines, and do nothing for a model
    that is not pruned. Give them before callbacks that write checkpoints. If the pruned model is a
    part of another one, give them after callbacks that set weights when training ends, such as
    `EarlyStopping(restore_best_weights=True)`, so that these weights are masked.

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
    """Prune in `fit`, with either engine, and warn if the training is too short for the schedule.

    A model with a `Pruner` is pruned in its own training step. If it is a part of another model,
    this callback prunes it instead, and makes the other model's optimizer train the scores of a
    `ScorePruner`.

    A model in tfmot's wrappers needs this callback. It includes tfmot's `UpdatePruningStep`,
    without which the wrappers refuse to train, and applies the masks after every batch. (tfmot
    itself applies them only in the next forward pass, so the weights are dense after an optimizer
    step.) Give this callback before those that write checkpoints. `AdversarialTraining` applies
    masks inside its step; there, this callback masks the averages by which Keras replaces the
    weights when training ends (`use_ema=True`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._tfmots: Any = None
        self._apply: Any = None
        self._pruners: list[Any] = []
        self._steps: dict[Any, tuple[Any, Callable[[], None]]] = {}
        self._training = contextlib.ExitStack()
        self._is_first_epoch = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the pruners and wrappers of the model, and apply the masks."""
        model = self.model
        self._training.close()  # in case the last training was interrupted
        self._find_pruners()
        for pruner in self._pruners:
            own = self._trainer_of(pruner)
            if self._is_elsewhere(pruner) and own is not None:
                pruner.on_train_begin(own)
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
        self._is_first_epoch = True

    def _is_elsewhere(self, pruner: Any) -> bool:
        """Return whether a pruner belongs to a part of the model that is trained."""
        return pruner.model is not self.model and not isinstance(self.model, flavours.Trainer)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Find the pruners again; in the first epoch, check the planned number of steps.

        A callback may have pruned the model, or stripped it, since the last epoch.

        Warns:
            UserWarning: in the planned number of steps, the masks are not renewed at the final
                sparsity of the schedule, or the pruner's regrowth moves no weight.
        """
        if not (self.params or {}).get("steps"):
            for pruner in self._pruners:
                pruner.skip_steps(self._optimizer_of(pruner))
        self._find_pruners()
        if self._is_first_epoch:
            self._is_first_epoch = False
            self._warn_if_too_short(epoch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Apply the masks after the optimizer step."""
        if self._apply is not None:
            self._apply()
        if not all(pruner.is_attached for pruner in self._pruners):
            self._find_pruners()
        for pruner in self._pruners:
            optimizer, step = self._step_of(pruner)
            if pruner.is_behind(optimizer):
                step()

    def _find_pruners(self) -> None:
        """Find the pruners of the model, and make it compile its steps again for a new one."""
        found = masks.pruners(self.model)
        flavours.register_trainer(self.model, *(pruner.model for pruner in found))
        if any(pruner not in self._pruners for pruner in found):
            held = optimizers.held(self.model)
            self._training.enter_context(masks.training(self.model, *held))
        self._pruners = found
        self._steps = {}

    def _step_of(self, pruner: Any) -> tuple[Any, Callable[[], None]]:
        """Return the optimizer that trains the weights of a pruner, and the pruner's step function.

        Both are cached until the next epoch, or until the model has another optimizer.
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
        """Return the optimizer that trains the weights of a pruner, or the compiled one."""
        own = self._trainer_of(pruner)
        return self.model.optimizer if own is None else own

    def _trainer_of(self, pruner: Any) -> Any:
        """Return the optimizer that trains the weights of a pruner; None if it is not known yet."""
        variables = [target.variable for target in pruner.targets]
        return optimizers.trainer_of(self.model, variables)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Tell regrowth that follows the validation how the epoch ended; call tfmot's callback.

        Raises:
            ValueError: the logs have no accuracy.
        """
        if self._tfmots is not None:
            self._tfmots.on_epoch_end(epoch, logs)
        for pruner in self._pruners:
            if not pruner.frozen:
                pruner.on_epoch_end(logs or {})

    def on_train_end(self, logs: Any = None) -> None:
        """Apply the masks again: Keras may have replaced the weights by averages."""
        self._training.close()
        masks.apply(self.model, self.model.optimizer)
        for pruner in self._pruners:
            if self._is_elsewhere(pruner):
                pruner.on_train_end(self._optimizer_of(pruner))

    def _warn_if_too_short(self, epoch: int) -> None:
        """Warn of schedules that do not reach their final sparsity in the planned training."""
        params = self.params or {}
        if not params.get("epochs") or not params.get("steps"):
            return
        planned = (params["epochs"] - epoch) * params["steps"]
        innermost = optimizers.innermost(self.model.optimizer)
        planned //= getattr(innermost, "gradient_accumulation_steps", None) or 1
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
                    "or renew more often, or call the pruner's finalize() after training.",
                    UserWarning,
                    stacklevel=2,
                )
        for pruner in self._pruners:
            self._warn_if_too_late(pruner, params["steps"])
            first = pruner.regrowth and pruner.regrowth.first_move(pruner.schedule)
            if not pruner.frozen and first and first > pruner.steps + planned:
                warnings.warn(
                    f"{pruner.regrowth!r} moves no weight in the training planned, steps "
                    f"{pruner.steps + 1} to {pruner.steps + planned}: the first move is at step "
                    f"{first}. Train longer, or use a smaller frequency.",
                    UserWarning,
                    stacklevel=2,
                )

    def _warn_if_too_late(self, pruner: Any, steps_per_epoch: int) -> None:
        """Warn if a regrowth moves its last weight before it has the epochs that it needs."""
        if pruner.frozen or pruner.regrowth is None or not pruner.regrowth.epochs:
            return
        missing = int(np.sum(np.isnan(pruner.state.history.numpy()[1:, 0]))) + 1
        first, last = pruner.steps, pruner.regrowth.last_step(pruner.schedule)
        if first < last <= first + missing * steps_per_epoch:
            warnings.warn(
                f"{pruner.regrowth!r} will not follow the validation: it needs {missing} more "
                f"epochs of {steps_per_epoch} steps, and moves no weight from step {last} on. Take "
                "a smaller window or a larger until, or train longer.",
                UserWarning,
                stacklevel=2,
            )


class ConditionFeed(flavours.Callback):
    """Measure condition numbers for the `ConditionGated` schedules of a model.

    Each such schedule is given the largest condition number of the masked kernels that it prunes,
    when training begins and then every `frequency` optimizer steps, by NumPy's SVD in float64.
    Equal schedules count as one: after loading, a model has a copy for each layer.

    Args:
        frequency: number of optimizer steps between measurements, >= 1.
    """

    def __init__(self, frequency: int = 100) -> None:
        super().__init__()
        self.frequency = _checks.integer("frequency", frequency, minimum=1)
        self._governed: dict[Any, list[_Governed]] = {}
        self._measured_at = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Find the `ConditionGated` schedules, and measure for the first time."""
        self._governed = {}
        found = []
        wrapped = wrappers.wrapped_layers(self.model)
        for wrapper in wrapped:
            step = functools.partial(tf_keras.backend.get_value, wrapper.pruning_step)
            if any(kernel_layers.kernels(wrapper.layer)):
                found.append(_Governed(wrapper.pruning_schedule, wrapper, step))
        gated_around = gated.owners(self.model)
        pruners = masks.pruners(self.model)
        given = [*(w.pruning_schedule for w in wrapped), *(p.schedule for p in pruners)]
        for pruner in pruners:
            step = functools.partial(getattr, pruner, "steps")
            layers = {id(target.layer): target.layer for target, _ in pruner.masked_targets()}
            for layer in layers.values():
                if any(kernel_layers.kernels(layer)):
                    acting = gated_around.get(id(layer), layer)
                    found.append(_Governed(pruner.schedule, acting, step))
        if not given:
            return
        from tscnc_tf import schedules  # imports tfmot, where it is installed

        for governed in found:
            if isinstance(governed.schedule, schedules.ConditionGated):
                self._governed.setdefault(governed.schedule, []).append(governed)
        for schedule in given:
            if isinstance(schedule, schedules.ConditionGated) and schedule not in self._governed:
                warnings.warn(
                    f"{schedule!r} governs no weight that is read as a matrix, so there is no "
                    "condition number, and its gate stays open. Prune these layers by another "
                    "schedule, or prune kernels of dense layers and convolutions, too.",
                    UserWarning,
                    stacklevel=2,
                )
        if self._governed:
            self._measure()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Measure again after `frequency` steps (one batch may be several steps)."""
        if self._governed and self._step() - self._measured_at >= self.frequency:
            self._measure()

    def _step(self) -> int:
        return int(next(iter(self._governed.values()))[0].step())

    def _measure(self) -> None:
        self._measured_at = self._step()
        for schedule, governed in self._governed.items():
            reports = [inspection.condition_numbers(each.layer) for each in governed]
            worst = max(getattr(row, schedule.measure) for report in reports for row in report.rows)
            # Each copy at its own step, as parts of a model may be pruned from other steps on.
            for copy in {id(each.schedule): each for each in governed}.values():
                copy.schedule.update(worst, int(copy.step()))


class DataPosition(flavours.Callback):
    """Let training data begin where the optimizer is, also after a restored backup.

    Keras' `BackupAndRestore` restores a model and the number of the epoch, but no position in the
    data: a dataset that is shuffled anew in each epoch would begin with its first order again. Here
    the order of an epoch is a function of its number, and when `fit` begins, the data begin after
    as many batches as the optimizer has received. A training that was stopped and restored then
    equals an undisturbed one, bit for bit, if everything else is in the backup.

    Give it after `BackupAndRestore`, and pass the same object to `Dataset.training(position=...)`,
    or take `batches` for data of your own. Without it in `callbacks=` the data begin at the first
    batch.

    An optimizer that has trained before begins where it is, too; the number of the epoch that `fit`
    shows has no part in it.

    Raises:
        ValueError: in `fit`, if a backup was restored after the position had been read.

    Warns:
        UserWarning: the optimizer scales the loss. Steps that it skips do not count, so that a
            restored training may get a batch again.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> data = tscnc.datasets.load("digits")
        >>> model = keras.Sequential(
        ...     [keras.Input(data.image_shape), keras.layers.Flatten(), keras.layers.Dense(10)])
        >>> model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> position = tscnc.callbacks.DataPosition()
        >>> history = model.fit(
        ...     data.training(64, position=position), steps_per_epoch=data.steps_per_epoch(64),
        ...     epochs=3, shuffle=False, verbose=0,
        ...     callbacks=[keras.callbacks.BackupAndRestore("backup"), position])
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0
        self._is_new = False

    def batches(
        self, epoch: Callable[[tf.Tensor], tf.data.Dataset], steps_per_epoch: int
    ) -> tf.data.Dataset:
        """Return the batches of one epoch after the other, without an end.

        They begin at the position of the optimizer when `fit` began; at the first batch before.
        Pass `steps_per_epoch` to `fit` too.

        Args:
            epoch: returns the batches of an epoch from its number, an int64 scalar tensor, counted
                from 0; the same ones whenever it is called. Shuffle by a stateless function, as
                below: a dataset's own `shuffle` does not depend on the number.
            steps_per_epoch: the number of batches of an epoch.

        Raises:
            TypeError, ValueError: `steps_per_epoch` is no integer >= 1, or `epoch` no function.
            tf.errors.FailedPreconditionError: when they are read, if an epoch has fewer batches.

        Example:
            >>> import tensorflow as tf
            >>> import tscnc_tf as tscnc
            >>> position = tscnc.callbacks.DataPosition()
            >>> def epoch(number):
            ...     order = tf.random.experimental.stateless_shuffle(tf.range(6), [0, number])
            ...     return tf.data.Dataset.from_tensor_slices(order).batch(2)
            >>> batches = list(position.batches(epoch, 3).take(6))
            >>> [sorted(tf.concat(each, 0).numpy().tolist()) for each in (batches[:3], batches[3:])]
            [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
        """
        steps_per_epoch = _checks.integer("steps_per_epoch", steps_per_epoch, minimum=1)
        if not callable(epoch):
            raise TypeError(
                f"epoch must be a function from an epoch's number to its batches, got {epoch!r}."
            )

        def begin(_: tf.Tensor) -> tf.Tensor:
            steps = tf.numpy_function(lambda: np.int64(self._steps), [], tf.int64)
            return tf.ensure_shape(steps, ())

        def rest(steps: tf.Tensor) -> tf.data.Dataset:
            epochs = tf.data.Dataset.range(steps // steps_per_epoch, np.iinfo(np.int64).max)
            count = tf.data.experimental.assert_cardinality(steps_per_epoch)
            whole = epochs.flat_map(lambda number: epoch(number).take(steps_per_epoch).apply(count))
            return whole.skip(steps % steps_per_epoch)

        endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        return tf.data.Dataset.from_tensors(0).map(begin).flat_map(rest).apply(endless)

    def on_train_begin(self, logs: Any = None) -> None:
        """Read the position; the iteration over the data begins after this."""
        self._steps, self._is_new = self._position(), True
        optimizer = self.model.optimizer
        if optimizers.innermost(optimizer) is not optimizer:
            warnings.warn(
                "DataPosition counts the steps of the optimizer, which scales the loss: steps that "
                "it skips do not count, so a restored training may get some batches again.",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Check that the first epoch begins where the data do."""
        if self._is_new and self._position() != self._steps:
            raise ValueError(
                f"DataPosition must come after BackupAndRestore in callbacks=: the data begin at "
                f"batch {self._steps}, but the optimizer was restored at {self._position()}."
            )
        self._is_new = False

    def _position(self) -> int:
        return int(optimizers.batches(self.model.optimizer))


class RaiseOnNaN(flavours.Callback):
    """Raise an error in the step in which a log value, a weight or a slot stops being finite.

    Keras' `TerminateOnNaN` checks the loss, and ends `fit` without an error. But a gradient that is
    not finite does not change the loss of its own step, only the weights. And the optimizer's
    averages, or its momentum of weights that are masked, have no part in the loss at all. This
    callback checks all weights and all slots of the optimizer after each step, on the device. Give
    it before callbacks that write checkpoints, so that they write no such values.

    Args:
        first_batch: the number of the first batch, if `fit` continues within an epoch; for the
            message.

    Raises:
        TypeError, ValueError: `first_batch` is no integer >= 0.
        ValueError: in `fit`; it names the epoch, the batch, and the log values, weights or slots.

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
        self._names: dict[str, list[str]] = {}
        self._are_finite: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Discard the check of the last training."""
        self._are_finite = None

    def _find_variables(self) -> None:
        """Compile the check of weights and slots, which may be created only in the first batch."""
        weights = [each for each in self.model.weights if tf.as_dtype(each.dtype).is_floating]
        slots = [
            slot
            for optimizer in optimizers.held(self.model)
            for found in optimizers.companions(optimizer, self.model.trainable_variables)
            for slot in found
        ]
        self._names = {
            kind: [getattr(each, "path", each.name).partition(":")[0] for each in variables]
            for kind, variables in (("weights", weights), ("slots of the optimizer", slots))
        }
        tensors = [flavours.tensor_variable(each) for each in (*weights, *slots)]
        # A concrete function, as many calls of `tf.function` at one place give a warning.
        self._are_finite = tf.function(
            lambda: tf.stack([tf.reduce_all(tf.math.is_finite(each)) for each in tensors]),
            autograph=False,
        ).get_concrete_function()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Store the epoch, for the message."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Check the logs, the weights and the optimizer's slots."""
        if self._are_finite is None:
            self._find_variables()
        finite = iter(self._are_finite().numpy())
        bad = {
            kind: [name for name in names if not next(finite)]
            for kind, names in self._names.items()
        }
        wrong = {
            name: value for name, value in (logs or {}).items() if not np.all(np.isfinite(value))
        }
        kind = next((kind for kind, names in bad.items() if names), "")
        if not wrong and not kind:
            return
        where = f"After batch {self._first_batch + batch + 1} of epoch {self._epoch + 1}"
        if wrong:
            what = ", ".join(f"{name} is {value}" for name, value in wrong.items())
            if kind:
                count = len(self._names[kind])
                what += f", and {len(bad[kind])} of {count} {kind} are NaN or infinite"
        else:
            names = bad[kind]
            what = f"{kind} are NaN or infinite: {', '.join(names[:5])}"
            what += f" and {len(names) - 5} others" if len(names) > 5 else ""
        raise ValueError(
            f"{where} {what}. Lower the learning rate or the factors of the penalties, or clip the "
            "gradients; then continue from the last checkpoint."
        )


class _Governed(NamedTuple):
    """A schedule, a layer (or its wrapper) that it prunes, and a function that returns the step."""

    schedule: Any
    layer: Any
    step: Callable[[], Any]


class _ScalarLogger(flavours.Callback, abc.ABC):
    """Base of loggers: adds `scalars` to the logs of each epoch, and to TensorBoard's."""

    def __init__(self, log_dir: str | None = None) -> None:
        super().__init__()
        self._log_dir, self._writer = log_dir, None
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                f"log_dir={log_dir!r} needs TensorBoard: pip install tensorboard, or leave it out."
            )

    def on_train_begin(self, logs: Any = None) -> None:
        """Open a new TensorBoard file for each `fit`."""
        super().on_train_begin(logs)
        if self._log_dir is not None:
            self._writer = tf.summary.create_file_writer(str(self._log_dir))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the scalars to the logs."""
        scalars = self.scalars()
        if logs is not None:
            logs.update(scalars)
        if self._writer is not None:
            with self._writer.as_default(step=epoch):
                for name, value in scalars.items():
                    tf.summary.scalar(name, value)
            self._writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        """Close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    @abc.abstractmethod
    def scalars(self) -> dict[str, float]:
        """Return the present values for the model, by name."""


class KernelLogger(_ScalarLogger):
    """Log sparsity and condition number of every kernel after each epoch.

    They are in Keras' logs and history as `sparsity`, `condition_number` (the largest), and
    `sparsity/NAME`, `condition_number/NAME` for each kernel. Condition numbers may be infinite; the
    largest is NaN if no weight is read as a matrix.

    Args:
        log_dir: a folder to which the same values are written for TensorBoard, None for none.

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
        """Return the present values for the model, by name."""
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
    """Log how many gates are open after each epoch.

    Keras' logs and history have `expected_l0` (the expected number of weights whose gate is open in
    training) and `open_gates` (the share of gates above zero at inference), and `expected_l0/NAME`,
    `open_gates/NAME` for each gated layer. See `gates.report`.

    Args:
        log_dir: a folder to which the same values are written for TensorBoard, None for none.

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
        """Return the present values for the model, by name."""
        report = gates.report(self.model)
        names = _reports.unique(row.name for row in report.rows)
        scalars = {"expected_l0": report.expected_l0, "open_gates": report.open_share}
        for name, row in zip(names, report.rows, strict=True):
            scalars[f"expected_l0/{name}"] = row.expected_l0
            scalars[f"open_gates/{name}"] = row.open_share
        return scalars
