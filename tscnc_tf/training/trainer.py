"""Adversarial training as a Keras model around the user's model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, attacks, losses, regularizers
from tscnc_tf._keras import flavours, keras, masks, models, optimizers, tf_keras
from tscnc_tf.training.perturbation import AWP, at

__all__ = ["AdversarialTraining"]

LOGS = (
    "loss",
    "clean_loss",
    "robust_loss",
    "penalty",
    "clean_accuracy",
    "adversarial_accuracy",
)


_Base: Any = object  # replaced by a Keras model in the subclasses at the end of this file


class AdversarialTraining(flavours.Trainer, _Base):
    r"""A Keras model that trains another one on adversarial examples.

    Each step computes adversarial examples for its batch, and takes one training-mode forward pass
    (on the concatenated clean and adversarial batches, if the loss needs both) and one optimizer
    step on

    .. math:: \frac1N\sum_i w_i\,\ell(x_i, x_i', y_i) + \text{penalty}

    where the penalty is the sum of `model.losses`: the regularizers. Then the pruning masks are
    applied, so that weights are exactly sparse after every step.

    It is a `keras.Model` or a `tf_keras.Model`, depending on the Keras of `model`. A subclass must
    derive from the class for its Keras, `training.trainer.Keras3Trainer` or `TfKerasTrainer`.

    The adversary runs the network in inference mode, without pruning wrappers: BatchNorm's moving
    averages are used but not updated, and the pruning step counts optimizer steps.

    The logs hold `loss`, `clean_loss` (cross-entropy on the clean batch), `robust_loss` (the term
    of the robust loss, including its factor), `penalty`, `clean_accuracy` and
    `adversarial_accuracy`, and the metrics passed to `compile`, for the clean batch. With TRADES
    `loss = clean_loss + robust_loss + penalty`; with other losses `loss = robust_loss + penalty`,
    and the clean loss is only logged. `evaluate` uses the attack of training, which is cheap and
    suitable for monitoring; report results of `evaluate_robustness`. Callbacks that monitor an
    accuracy, such as EarlyStopping or ModelCheckpoint with `monitor="val_adversarial_accuracy"`,
    need `mode="max"` in Keras 3, which otherwise raises an error, since it can't infer the
    direction for a mean. (tf_keras infers it from the name.)

    Each batch is checked, before the part that XLA compiles, and a ValueError reports inputs
    outside of the attack's bounds, labels out of range, and soft labels that don't sum to 1, with
    the number of the batch. In the first batch (not under a distribution strategy) the networks'
    outputs are checked as well: probabilities are refused. Labels are integers of any dtype,
    one-hot or soft. Of soft labels the losses use the rows, the accuracies the largest entry, and
    the adversary the weights of `losses.log_odds`, which label smoothing does not change.

    Args:
        model: a model of either Keras that returns logits, `(batch, classes)`; pruned or not.
        attack: an attack of `tscnc_tf.attacks`. If its objective or start is None, that of the loss
            is used: TRADES ascends the KL divergence from the clean output.
        loss: `losses.TRADES(beta)`, `losses.Madry()`, `losses.MART(beta)` or
            `losses.RSLAD(teacher)`; stored as the attribute `robust_loss`. This attribute and
            `attack` may be set at any time, also in a callback, and take effect with the next step,
            which is compiled again unless the new value equals the old one. (A running evaluation
            of tf_keras finishes with the old ones.)
        awp: `training.AWP(gamma)`, to descend at adversarially perturbed weights; None for none.
            Like `attack` it may be set at any time: the authors begin after some epochs.
        seed: of the attacks' random starts. With it and `keras.utils.set_random_seed` (or
            `tf_keras.`) two runs on a CPU end with the same weights.
        name: of this model.

    Raises:
        TypeError: `model` is not a Keras model, `attack` not a gradient attack, or `loss` not a
            robust loss.
        ValueError: `model` is not built, or does not return one row of logits per example. Errors
            that only occur when it runs are raised by the first step.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> trainer = tscnc.AdversarialTraining(
        ...     model,
        ...     attack=tscnc.attacks.PGD(epsilon=8/255, step_size=2/255, steps=10),
        ...     loss=tscnc.losses.TRADES(beta=6.0))
        >>> trainer.compile(optimizer="sgd", metrics=["accuracy"])

    Reference:
        Zhang et al. 2019, arXiv 1901.08573 (TRADES); Madry et al. 2018, arXiv 1706.06083;
        Wang et al. 2020, ICLR (MART); Zi et al. 2021, arXiv 2108.07969 (RSLAD); TSCNC, arXiv
        2503.20454, for the penalties.
    """

    _is_in_step = False  # whether Keras builds, traces or runs a step

    def __new__(cls, model: Any, **kwargs: Any) -> Any:  # noqa: ARG004
        """Return a trainer of the Keras of `model`.

        The public class stands for one class per Keras. The model determines which one, so it is
        selected here; then Python calls its `__init__` as usual.
        """
        kind = {keras: Keras3Trainer, tf_keras: TfKerasTrainer}[_keras.library("model", model)]
        return super().__new__(flavours.subclass_of_library(cls, AdversarialTraining, kind))

    def __init__(
        self,
        model: Any,
        *,
        attack: attacks.GradientAttack,
        loss: losses.RobustLoss,
        awp: AWP | None = None,
        seed: int = 0,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        library = _keras.library("model", model)
        _keras.require_built("model", model)
        flavours.require_one_worker(model)
        _require_attack(attack)
        _require_awp(awp)
        regularizers.require_layouts(model)
        kwargs.setdefault("dtype", model.dtype_policy)
        super().__init__(name=name, autocast=False, **kwargs)  # each layer casts its own inputs
        self._classes = models.classes("model", model)  # None: set in the first batch
        losses.require_no_probabilities("model", model, attack.bounds)
        self.model = model
        flavours.register_trainer(self, model)
        self._first_batch = _FirstBatch()
        self._attack = attack
        self._awp = awp
        self.robust_loss = loss
        self.seed = _checks.seed("seed", seed)
        self._inference = _keras.inference(model)
        self._trackers = [library.metrics.Mean(name=name) for name in LOGS]
        self._pruners: tuple[Any, ...] = ()  # those that the training step was compiled with
        self.built = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, except `model`, which can't be replaced.

        Raises:
            AttributeError: `model` is set to another one.
        """
        if name == "model" and vars(self).get(name, value) is not value:
            raise AttributeError(
                f"model of trainer {self.name!r} can't be exchanged, since its optimizer and its "
                "compiled steps belong to the current one: build another trainer, "
                "AdversarialTraining(model, attack=..., loss=...)."
            )
        super().__setattr__(name, value)

    @property
    def robust_loss(self) -> losses.RobustLoss:
        """The loss of training; after setting it, the steps are compiled again.

        Raises:
            TypeError: it is set to something other than a robust loss.
        """
        return self._robust_loss

    @robust_loss.setter
    def robust_loss(self, loss: losses.RobustLoss) -> None:
        _require_loss(loss)
        if loss == getattr(self, "_robust_loss", None):
            return
        self._robust_loss = loss
        self._first_batch = _FirstBatch()  # there may be a new teacher to check
        self._update_adversary()

    @property
    def attack(self) -> attacks.GradientAttack:
        """The attack of training; after setting it, the steps are compiled again.

        Raises:
            TypeError: it is set to something other than a gradient attack.
            ValueError: it is set to a targeted attack.
        """
        return self._attack

    @attack.setter
    def attack(self, attack: attacks.GradientAttack) -> None:
        _require_attack(attack)
        if attack == self._attack:
            return
        self._attack = attack
        self._update_adversary()

    @property
    def awp(self) -> AWP | None:
        """The weight perturbation of training; after setting it, the steps are compiled again.

        Raises:
            TypeError: it is set to something other than an `AWP` or None.
        """
        return self._awp

    @awp.setter
    def awp(self, awp: AWP | None) -> None:
        _require_awp(awp)
        if awp == self._awp:
            return
        self._awp = awp
        self._update_adversary()

    def _update_adversary(self) -> None:
        """Apply the loss's defaults to the attack, and have the steps compiled again."""
        loss = self._robust_loss
        self._adversary = self._attack.with_defaults(objective=loss.objective, start=loss.start)
        flavours.reset_functions(self)

    def compile(
        self, optimizer: Any = "rmsprop", loss: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Configure training like `Model.compile`, with the loss of the constructor.

        `jit_compile` is False by default, in Keras 3 as well.

        Raises:
            ValueError: a loss is passed here.
        """
        if loss is not None:
            raise ValueError(
                "loss must be given to AdversarialTraining(..., loss=...), not to compile, got "
                f"{loss!r}."
            )
        kwargs.setdefault("jit_compile", False)
        super().compile(optimizer=optimizer, metrics=metrics, **kwargs)
        # Keras 3's tracker, replaced by one of `_trackers`. (tf_keras has none without a loss.)
        self._loss_tracker = None

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile by the result of `get_compile_config()`, and build the optimizer for loading."""
        self.compile(**flavours.library_of(type(self)).saving.deserialize_keras_object(config))
        if hasattr(self.optimizer, "build"):  # legacy optimizers have none
            self.optimizer.build(self.trainable_variables)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train like `Model.fit`, after checking arrays.

        Raises:
            ValueError: the trainer is not compiled, `x` is empty or outside the attack's bounds, a
                label is out of range, or `jit_compile` is set on several CPU devices.
        """
        if getattr(self, "optimizer", None) is None:
            raise ValueError(
                f"trainer {self.name!r} is not compiled: call trainer.compile(optimizer=...) first."
            )
        _check_arrays(x, y, self.attack.bounds, self._classes)
        with masks.training(self.model, self.optimizer):
            history = super().fit(x, y, *args, **kwargs)
        masks.end_training(self.model, self.optimizer)  # a callback may have set other weights
        return history

    def set_weights(self, weights: Any) -> None:
        """Set the weights, and apply the masks to them."""
        super().set_weights(weights)
        masks.on_weights_set(self.model)

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights, and masks where the file has them, and apply the masks.

        Raises:
            ValueError: the file is of another network; or, in Keras 3, of one that was pruned and
                this one is not, or the other way round.
        """
        try:
            return super().load_weights(filepath, *args, **kwargs)
        except ValueError as error:
            raise ValueError(
                f"{error} If only one of them is pruned: trainer.model.save_weights() and "
                "load_weights() work for both."
            ) from error
        finally:  # also after an error, as some weights may have been loaded
            masks.on_weights_set(self.model)

    def make_train_function(self, force: bool = False) -> Any:
        """Compile the training step, again if the model has been pruned or stripped since."""
        pruners = masks.pruners(self.model)
        if [id(pruner) for pruner in pruners] != [id(pruner) for pruner in self._pruners]:
            force = True
        self._pruners = tuple(pruners)
        for pruner in pruners:
            pruner.on_train_begin(self.optimizer)
        return self._make(
            *("train_function", super().make_train_function, force, self._build, self._where)
        )

    def _build(self) -> None:
        """Create the optimizer's variables.

        Within a step they would be created after the checks, and stay uninitialised if one fails.
        """
        with self.distribute_strategy.scope():
            optimizers.build(self.optimizer, self.model.trainable_variables)

    def _where(self) -> str:
        """Return which batch an error is about; one that fails a check is not counted yet."""
        return f" This is batch {int(optimizers.batches(self.optimizer)) + 1} of the optimizer."

    def make_test_function(self, force: bool = False) -> Any:
        """Compile the evaluation's step."""
        return self._make("test_function", super().make_test_function, force)

    def _make(
        self,
        name: str,
        make: Callable[..., Any],
        force: bool,
        begin: Callable[[], None] = lambda: None,
        where: Callable[[], str] = lambda: "",
    ) -> Any:
        """Have Keras compile a step unless it exists, and return it.

        Args:
            name: the attribute of the step.
            make: Keras' method that compiles it.
            force: whether to compile an existing step again.
            begin: called before the first run of the step.
            where: returns what follows the message of a failed check.
        """
        flavours.require_xla(self)
        if getattr(self, name) is None or force:
            with self._within_step():
                make(force=True)
            setattr(self, name, self._with_value_errors(getattr(self, name), begin, where))
        return getattr(self, name)

    def _with_value_errors(
        self, function: Callable[..., Any], begin: Callable[[], None], where: Callable[[], str]
    ) -> Callable[..., Any]:
        """Return a compiled step that raises failed checks as ValueErrors, as in eager code."""
        todo = [begin]

        def step(*args: Any) -> Any:
            while todo:
                todo.pop()()
            with self._within_step():
                try:
                    logs = function(*args)
                except tf.errors.InvalidArgumentError as error:
                    found = _checks.as_value_error(error)
                    if found is None:
                        raise
                    raise ValueError(f"{found}{where()}") from None
            if not self._first_batch.is_over:
                self._first_batch.end()
            return logs

        return step

    @contextlib.contextmanager
    def _within_step(self) -> Iterator[None]:
        """Set `_is_in_step` while Keras builds, traces or runs a step."""
        before, self._is_in_step = self._is_in_step, True
        try:
            yield
        finally:
            self._is_in_step = before

    @property
    def jit_compile(self) -> bool:
        """Whether XLA compiles the steps, except for the checks of a batch, which run before.

        XLA drops checks. So this is False while Keras builds the steps, and the part after the
        checks is compiled here. (Under a distribution strategy Keras compiles the whole step,
        without checks.)
        """
        return self._wants_xla and not self._checks_before_xla

    @jit_compile.setter
    def jit_compile(self, value: Any) -> None:
        flavours.library_of(type(self)).Model.jit_compile.fset(self, value)

    @property
    def _wants_xla(self) -> bool:
        return bool(flavours.library_of(type(self)).Model.jit_compile.fget(self))

    @property
    def _checks_before_xla(self) -> bool:
        return self._is_in_step and not flavours.is_distributed(self)

    def _compiled(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Return the part of a step after the checks, compiled by XLA if `jit_compile` is set."""
        if not (self._wants_xla and self._checks_before_xla):
            return step
        return tf.function(step, jit_compile=True, reduce_retracing=True, autograph=False)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the logits of the inner model."""
        return self.model(inputs, training=training)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Take one optimizer step on a batch `(x, y)` or `(x, y, sample_weight)`; return logs."""
        return self._checked(self._train_batch, data)

    def _train_batch(self, x: tf.Tensor, y: tf.Tensor, sample_weight: Any) -> dict[str, Any]:
        reference = self.robust_loss.reference(x)
        known = self._known_clean(x, reference)
        x_adversarial = self._perturb(x, y, self._step_seed(), known, reference)
        result: dict[str, Any] = {}
        perturbed = self._perturbed(x, y, x_adversarial, known, reference, sample_weight)

        def total() -> tf.Tensor:
            with perturbed():
                if self.robust_loss.uses_clean:
                    both = self.model(tf.concat([x, x_adversarial], axis=0), training=True)
                    clean, adversarial = tf.split(both, 2)
                else:
                    clean, adversarial = known, self.model(x_adversarial, training=True)
            terms = self._terms(y, clean, adversarial, reference, sample_weight)
            if not result:  # the first call is at unperturbed scores, which are logged
                result.update(clean=clean, adversarial=adversarial, terms=terms)
            value = tf.reduce_mean(terms["loss"]) + terms["penalty"]
            # Gradients are summed over replicas, so each contributes its share of the mean.
            return value / tf.distribute.get_strategy().num_replicas_in_sync

        ascended = functools.partial(flavours.without_trace, self.model, total)
        in_step = optimizers.in_step(optimizers.batches(self.optimizer))
        with in_step, masks.step(self.model, self.optimizer, ascended):
            flavours.minimize(self.optimizer, total, self.model.trainable_variables)
        return self._logs(x, y, sample_weight=sample_weight, **result)

    def test_step(self, data: Any) -> dict[str, Any]:
        """Attack a batch in inference mode, and return the logs."""
        return self._checked(self._evaluate_batch, data)

    def _evaluate_batch(self, x: tf.Tensor, y: tf.Tensor, sample_weight: Any) -> dict[str, Any]:
        reference = self.robust_loss.reference(x)
        clean = self._inference(x)
        x_adversarial = self._perturb(x, y, tf.constant([self.seed, 0]), clean, reference)
        adversarial = self._inference(x_adversarial)
        terms = self._terms(y, clean, adversarial, reference, sample_weight)
        return self._logs(x, y, clean, adversarial, terms, sample_weight)

    def _checked(self, step: Callable[..., Any], data: Any) -> dict[str, Any]:
        """Run a step on a batch after checking it."""
        unpack = flavours.library_of(type(self)).utils.unpack_x_y_sample_weight
        x, y, sample_weight = unpack(data)
        x, y = _checks.training_batch(x, y)
        if self._classes is None:
            self._classes = models.traced_classes("model", self._inference, x)
        checks = _checks.require_within(x, self.attack.bounds)
        checks += _checks.require_classes(y, self._classes) + self._require_logits(x)
        # A batch that fails a check must not change anything.
        with flavours.depending_on_batch(self, data), flavours.depending_on(checks):
            return self._compiled(step)(x, y, sample_weight)

    def _require_logits(self, x: tf.Tensor) -> list[tf.Operation]:
        """Raise a ValueError unless the networks return logits; in a graph, return the assertions.

        This is checked in the first batch only; not in graphs that are not built by this trainer,
        nor under a distribution strategy, where a condition does not support all operations.
        """
        is_in_reach = tf.executing_eagerly() or self._is_in_step
        if self._first_batch.is_over or not is_in_reach or tf.distribute.has_strategy():
            return []
        networks = {"model": self._inference, "teacher": self.robust_loss.reference}

        def look() -> list[Any]:
            found = [network(x) for network in networks.values()]
            return [nothing if z is None else _checks.are_probabilities(z) for z in found]

        nothing = tf.constant(False)
        are_wrong = tf.cond(self._first_batch.flag, look, lambda: [nothing] * len(networks))
        checks = []
        for name, is_wrong in zip(networks, are_wrong, strict=True):
            checks += _checks.require(~is_wrong, _checks.about_probabilities(name))
        return checks

    def _known_clean(self, x: tf.Tensor, reference: tf.Tensor | None) -> tf.Tensor | None:
        """Return the clean logits in inference mode if this step needs them, else None."""
        needs_reference = self._adversary.objective == "kl" and reference is None
        needed = needs_reference or not self.robust_loss.uses_clean
        return self._inference(x) if needed else None

    def _perturb(self, x: Any, y: Any, seed: tf.Tensor, clean: Any, reference: Any) -> tf.Tensor:
        """Return adversarial examples; the loss's reference, if any, replaces the clean logits."""
        origin = clean if reference is None else reference
        x_adversarial = self._adversary.perturb(
            self._inference, x, y, seed=seed, clean_logits=origin
        )
        return tf.stop_gradient(x_adversarial)

    def _perturbed(
        self, x: Any, y: Any, x_adversarial: Any, known: Any, reference: Any, sample_weight: Any
    ) -> Callable[[], contextlib.AbstractContextManager[None]]:
        """Return the context of this step's perturbed weights; without AWP it does nothing."""
        if self._awp is None:
            return contextlib.nullcontext
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            raise ValueError(
                f"awp must be None under a strategy of several replicas, got {self._awp!r}: each "
                "replica would perturb its weights in another direction."
            )
        if radius := max((each.perturb_scores for each in masks.pruners(self.model)), default=0.0):
            raise ValueError(
                f"awp must be None for a model of perturb_scores={radius:g}, got {self._awp!r}: "
                "one perturbs weights, the other the scores that choose them. Use one of them."
            )

        def raised() -> tf.Tensor:
            clean = self._inference(x) if self.robust_loss.uses_clean else known
            adversarial = self._inference(x_adversarial)
            loss = self._terms(y, clean, adversarial, reference, sample_weight)["loss"]
            return flavours.scaled(self.optimizer, tf.reduce_mean(loss))

        return functools.partial(at, *self._awp.perturbed(self.model, raised))

    def _step_seed(self) -> tf.Tensor:
        """Return a pair of seeds that is different for every step and replica."""
        context = tf.distribute.get_replica_context()
        replica = tf.cast(context.replica_id_in_sync_group, tf.int32)
        step = tf.cast(optimizers.batches(self.optimizer), tf.int32)
        return tf.stack([self.seed, 1 + step * context.num_replicas_in_sync + replica])

    def _terms(
        self, y: Any, clean: tf.Tensor, adversarial: tf.Tensor, reference: Any, sample_weight: Any
    ) -> dict[str, tf.Tensor]:
        """Return the terms of the loss per example, weighted, and the penalty, a scalar."""
        clean_loss = losses.cross_entropy(y, clean)
        extra = () if reference is None else (reference,)
        robust_loss = self.robust_loss.robust(y, clean, adversarial, *extra)
        if sample_weight is not None:
            sample_weight = tf.reshape(tf.cast(sample_weight, clean_loss.dtype), (-1,))
            clean_loss, robust_loss = clean_loss * sample_weight, robust_loss * sample_weight
        loss = clean_loss + robust_loss if self.robust_loss.adds_clean_loss else robust_loss
        penalties = [tf.cast(penalty, loss.dtype) for penalty in self.model.losses]
        penalty = tf.add_n(penalties) if penalties else tf.zeros((), loss.dtype)
        return {
            "loss": loss,
            "clean_loss": clean_loss,
            "robust_loss": robust_loss,
            "penalty": penalty,
        }

    def _logs(
        self,
        x: Any,
        y: Any,
        clean: tf.Tensor,
        adversarial: tf.Tensor,
        terms: dict[str, tf.Tensor],
        sample_weight: Any,
    ) -> dict[str, Any]:
        values = {
            **terms,
            "loss": terms["loss"] + terms["penalty"],
            # Per example, so that a smaller batch counts less, as it does in the other terms.
            "penalty": tf.broadcast_to(terms["penalty"], tf.shape(terms["loss"])),
            "clean_accuracy": _correct(y, clean),
            "adversarial_accuracy": _correct(y, adversarial),
        }
        for tracker in self._trackers:
            tracker.update_state(values[tracker.name])
        return self.compute_metrics(x, y, clean, sample_weight)

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Save the trainer, its model and the optimizer's state to a `.keras` file.

        Raises:
            ValueError: `filepath` has another ending.
        """
        if not str(filepath).endswith(".keras"):
            raise ValueError(
                f"filepath must end in .keras, got {str(filepath)!r}: a trainer is saved in that "
                "format. For a SavedModel to serve, call export_saved_model(trainer.model, ...)."
            )
        super().save(filepath, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, including the model with its wrappers."""
        serialize = flavours.library_of(type(self)).saving.serialize_keras_object
        return {
            "model": serialize(self.model),
            "attack": serialize(self.attack),
            "loss": serialize(self.robust_loss),
            **({} if self.awp is None else {"awp": serialize(self.awp)}),
            "seed": self.seed,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Build a trainer from `get_config()`; with tfmot's wrappers, within `prune_scope()`."""
        config = dict(config)
        deserialize = flavours.library_of(cls).saving.deserialize_keras_object
        for key in {"model", "attack", "loss", "awp"} & set(config):
            config[key] = deserialize(config[key], custom_objects)
        return cls(**config)


def _require_attack(attack: Any) -> None:
    """Raise a TypeError unless it is a gradient attack, and a ValueError if it is targeted."""
    if not isinstance(attack, attacks.GradientAttack):
        raise TypeError(
            f"attack must be one of tscnc_tf.attacks that follow the gradient, such as PGD, "
            f"got {attack!r}."
        )
    if attack.targeted:
        raise ValueError(
            "attack must be untargeted, got targeted=True: it would move each example towards "
            "its own label, and the examples would be easier than the clean ones."
        )


def _require_loss(loss: Any) -> None:
    """Raise a TypeError unless `loss` is a robust loss."""
    if not isinstance(loss, losses.RobustLoss):
        raise TypeError(
            f"loss must be one of tscnc_tf.losses, such as TRADES(beta=6.0), got {loss!r}."
        )


def _require_awp(awp: Any) -> None:
    """Raise a TypeError unless `awp` is an `AWP` or None."""
    if not isinstance(awp, AWP | None):
        raise TypeError(f"awp must be None or an AWP, such as AWP(gamma=0.005), got {awp!r}.")


def _correct(y: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Return 1.0 for each example whose largest logit is that of its label, else 0.0."""
    labels = losses.one_hot(y, logits.shape[-1])
    hit = tf.equal(tf.argmax(labels, axis=-1), tf.argmax(logits, axis=-1))
    return tf.cast(hit, tf.float32)


def _check_arrays(x: Any, y: Any, bounds: tuple[float, float], classes: int | None) -> None:
    """Check NumPy arrays completely before training; other data is checked batch by batch."""
    for name, array in (("x", x), ("y", y)):
        if isinstance(array, np.ndarray) and not (array.ndim and len(array)):
            raise ValueError(f"{name} must hold at least one example, got shape {array.shape}.")
    if isinstance(x, np.ndarray):
        # Keras names x for labels that it can't use.
        if y is not None and not getattr(y, "shape", ()):
            raise TypeError(f"y must be an array or tensor of labels, got {y!r}.")
        _checks.require_floats(x.dtype)
        _checks.require_within(np.array([x.min(), x.max()]), bounds)
    if isinstance(y, np.ndarray) and np.issubdtype(y.dtype, np.integer) and y.size:
        _checks.require_classes(y, classes)


class _FirstBatch:
    """A flag for checks in the first batch of a compiled step, as a condition of its graph.

    Attributes:
        is_over: whether a first batch has passed the checks.
        flag: a boolean variable, True until then.
    """

    def __init__(self) -> None:
        self.is_over = False
        # TensorFlow traces a step twice if variables are created in it.
        with tf.init_scope():
            self.flag = tf.Variable(True, trainable=False, name="is_first_batch")

    def end(self) -> None:
        """Record that the first batch has passed the checks."""
        self.is_over = True
        self.flag.assign(False)


@flavours.registered_as("AdversarialTraining")
class Keras3Trainer(AdversarialTraining, keras.Model):
    """`AdversarialTraining` of a Keras 3 model."""


@flavours.registered_as("AdversarialTraining")
class TfKerasTrainer(AdversarialTraining, tf_keras.Model):
    """`AdversarialTraining` of a tf_keras model."""
