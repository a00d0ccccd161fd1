"""Pruning by trained importance scores (HYDRA), by the masks engine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _keras, functional
from tscnc_tf._keras import flavours, masks, optimizers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.flavours import depending_on, tensor_variable, trainers, update_everywhere
from tscnc_tf._keras.masks import kept
from tscnc_tf._keras.optimizers import assign
from tscnc_tf.pruning import learned, structures
from tscnc_tf.pruning import scores as arithmetic
from tscnc_tf.pruning.configs import deserialize_selection
from tscnc_tf.pruning.learned import Learned
from tscnc_tf.pruning.pruner import Pruner
from tscnc_tf.pruning.structures import Structure
from tscnc_tf.pruning.targets import Target, candidates, require_model

__all__ = ["ScorePruner"]

_ALSO_TRAIN = ("normalization", "all", "none")


@_keras.register
class ScorePruner(Pruner):
    r"""Trains a score for each weight, to choose the weights to keep. The weights do not change.

    Of each kernel :math:`w` the k weights with the largest :math:`|s|` are kept, and the others are
    zero: after every step the kernel of the layer is :math:`w \odot m`,
    :math:`m = 1[|s| \in \text{top } k]`. Exactly k weights are kept, also with ties. The scores are
    initialised by

    .. math:: s = \sqrt{6/\text{fan-in}}\; w / \max|w|

    so that at first the largest weights are kept. The gradient of the scores is straight-through:
    it passes the choice of the masks as if that were the identity.

    .. math:: \partial L/\partial s = \partial L/\partial(w\odot m) \odot w \odot \text{sign}(s)

    Pruned weights have this gradient too, so they can come back. (At first s has the sign of w.
    Without the last factor, the magnitude of a negative score would fall if its weight is useful.)

    The pruner is attached to the model in place, as with `Pruner`, and prunes it at once. From then
    on its `fit`, and `AdversarialTraining`, train the scores in place of the kernels. The optimizer
    applies its momentum, clipping, loss scale, weight decay and moving averages to the scores and
    their gradients. If Keras replaces weights by averages (`use_ema=True`), the averages become the
    scores and choose the masks; if in addition a callback of `fit` attaches this pruner, give
    `callbacks.pruning_callbacks()`, too. Keras' `SwapEMAWeights` does not work here: it would
    replace weights by scores. Penalties on kernels, such as `TSCNC`, are part of the loss.

    Your own training loop calls `apply_gradients` of this pruner in place of the optimizer's. For a
    model inside another one, give `callbacks.pruning_callbacks()`. Weights that are set or loaded
    from outside (`set_weights`, `load_weights`) become the dense weights, and their scores are
    initialised again.

    `pruning.freeze_mask(model)` ends this training: the masks are frozen, the weights
    :math:`w \odot m` are trained again, and the model's pruner is a frozen `Pruner`. Compile the
    model again for it. `strip` ends it, too, and leaves no pruner.

    Until then, dense weights and scores take twice the memory of the kernels, also in `.keras`
    files. Everything else is as with `Pruner`.

    Args:
        model: a built, trained model of either Keras; it may be subclassed.
        sparsity: fraction of zeros, in [0, 1).
        frequency: number of optimizer steps between renewals of the masks, >= 1. A renewal takes
            some 30 passes over the scores. The masks are renewed once more at the end.
        also_train: what is trained in addition to the scores: "normalization" (γ and β of
            normalization layers, as in the authors' code), "all" that is trainable, including
            biases and kernels that are not pruned, or "none". In any case the moving statistics of
            BatchNorm are updated.
        layers: which layers, as in `Pruner`.
        weights: a pattern for the names of weights, as in `Pruner`.
        min_rank: the smallest rank of a weight to prune, >= 2.
        structure: as in `Pruner`; the score of a unit is the mean of :math:`|s|`.
        scope: as in `Pruner`; or "learned", or `Learned()` with options, to train the shares of the
            layers together with the scores.
        min_weights: the minimum number of kept weights of every weight tensor.
        perturb_scores: the radius of an adversarial step on the scores before each step of the
            optimizer, relative to the norm of the scores of each weight tensor, >= 0; 0 for none.
            See `perturbed`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the model is not built or already pruned, no weight is left to prune, a kernel
            is all zero or not finite, a layer has LoRA enabled, or an argument is out of range.

    Warns:
        UserWarning: as `Pruner`.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
        >>> pruner = tscnc.pruning.ScorePruner(model, 0.75)
        >>> tscnc.inspection.sparsity(model).sparsity
        0.75
        >>> tscnc.pruning.freeze_mask(model).pruner.frozen
        True

    Reference:
        Sehwag et al. 2020, "HYDRA: Pruning Adversarially Robust Neural Networks", arXiv 2002.10509,
        section 3; Ramanujan et al. 2020, arXiv 1911.13299, for the straight-through scores;
        arXiv 2412.14714 (HARP) for learned shares, arXiv 2510.18381 (S2AP) for perturbed scores.
    """

    def __init__(
        self,
        model: Any,
        sparsity: float,
        *,
        frequency: int = 1,
        also_train: str = "normalization",
        layers: Any = None,
        weights: str | None = None,
        min_rank: int = 2,
        structure: Structure | None = None,
        scope: str | Mapping[str, float] | Learned = "layer",
        min_weights: int = 1,
        perturb_scores: float = 0.0,
    ) -> None:
        require_model(model)
        _require_no_lora(kernel_layers.flatten(model))
        found = candidates(model, layers, weights, min_rank, _unfit(structure, layers))
        is_new = found is not layers  # else the pruner is restored
        for target, reason in found if is_new else ():
            if not reason:
                _require_rankable(target, f"model {model.name!r}")
        schedule = Every(
            _checks.sparsity("sparsity", sparsity),
            _checks.integer("frequency", frequency, minimum=1),
        )
        self.also_train = _checks.one_of("also_train", also_train, _ALSO_TRAIN)
        self.perturb_scores = _checks.number("perturb_scores", perturb_scores, minimum=0.0)
        self._set_up(
            model,
            schedule,
            found,
            criterion=None,
            structure=structure,
            scope=learned.normalized(scope),
            min_weights=min_weights,
        )
        if is_new:
            self._begin_new()
        self.choose()

    def _set_up(self, *arguments: Any, **options: Any) -> None:
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers that took a step
        self._running_steps = 0  # steps of optimizers on scores, one per replica
        self._perturbations = 0  # open contexts of `perturbed`, one per replica
        super()._set_up(*arguments, **options)
        scope = self._selection.scope
        if isinstance(scope, Learned):
            min_weights = self._selection.min_weights
            self._shares = learned.TrainedShares(
                scope, self.targets, self._asked, min_weights, self.state
            )
        self._initialise()

    def begin(self) -> None:
        """Initialise dense weights and scores from the present kernels, and choose the masks.

        The constructor does so. Called again, it discards the trained scores. It consists of
        TensorFlow operations, for a program that gets the weights at run time.
        """
        self._initialise()
        self.choose()

    def _initialise(self) -> None:
        for target, dense, score in self.triples():
            weight = tf.convert_to_tensor(tensor_variable(target.variable))
            dense.assign(weight)
            score.assign(arithmetic.initial(weight, target))
        self._reset_shares(self._first_masks)

    def _new_state(self) -> Any:
        has_shares = isinstance(self._selection.scope, Learned)
        return masks.new_state(self, is_scored=True, has_shares=has_shares)

    def triples(self) -> list[tuple[Target, Any, Any]]:
        """Return (target, variable of the dense weights, variable of the scores) for each."""
        dense, scores = self.state.dense, self.state.scores
        return [(self.targets[index], dense[index], scores[index]) for index in self.held()]

    @property
    def shares(self) -> dict[str, float]:
        """The trained shares of kept weights, by name; empty unless the scope is `Learned`.

        The numbers of kept weights are in proportion to them; `pruning.report` has these numbers.
        """
        return {} if self._shares is None else self._shares.named(self.held())

    @property
    def frequency(self) -> int:
        """The number of optimizer steps between renewals of the masks."""
        return self.schedule.frequency

    def training(self, optimizer: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which an optimizer trains the scores in place of the kernels.

        `fit`, `AdversarialTraining` and the callbacks enter it by themselves.

        Args:
            optimizer: the optimizer; None for all that the model holds.

        Raises:
            ValueError: LoRA was enabled in a layer whose scores are trained.
        """
        _require_no_lora(target.layer for target in self.targets)
        stack = contextlib.ExitStack()
        given = [] if optimizer is None else [optimizers.require(optimizer)]
        for each in given or optimizers.held(self.model):
            stack.enter_context(optimizers.intercept(each, self._on_step, self._on_finalize))
        return stack

    @contextlib.contextmanager
    def perturbed(self, loss: Callable[[], tf.Tensor]) -> Iterator[None]:
        r"""Return a context in which perturbed scores choose the kept weights.

        The scores of each weight tensor are perturbed by one step that raises the loss,

        .. math:: s + \rho\, \|s\|_2\, g / \|g\|_2, \qquad g = \partial L / \partial s

        with :math:`\rho` = `perturb_scores`. The scores themselves do not change. The next
        optimizer step applies the gradient that is computed in the context to them, and restores
        the weights that they choose.

        `AdversarialTraining` uses it in each step, at the cost of one more training pass (forward
        and backward) and one more choice of the weights. Keras' own `fit` can't, and raises an
        error. Your own training loop computes its gradients, and calls `apply_gradients`, in this
        context.

        Args:
            loss: returns the training loss, a scalar. Other state that it changes (moving
                statistics, seeds of Dropout) is restored.
        """
        if not self.perturb_scores:
            yield
            return
        active = self._active()
        targets = [self.targets[index] for index in active]
        with tf.GradientTape() as tape:
            value = flavours.without_trace(self.model, loss)
        kernels = [target.variable for target in targets]
        found = tape.gradient(value, kernels, unconnected_gradients="zero")
        gradients = flavours.sum_over_replicas([tf.convert_to_tensor(each) for each in found])
        update_everywhere(
            self.model, lambda strategy: self._assign_perturbed(strategy, active, gradients)
        )
        self._perturbations += 1
        try:
            yield
        except BaseException:  # also an interrupt
            if tf.executing_eagerly():
                self.apply()
            raise
        finally:
            self._perturbations -= 1

    def _assign_perturbed(
        self, strategy: Any, active: list[int], gradients: list[tf.Tensor]
    ) -> None:
        """Assign the weights that perturbed scores choose to the kernels of some targets."""
        dense, scores = [self.state.dense[index] for index in active], []
        for index, weight, slope in zip(active, dense, gradients, strict=True):
            score = self.state.scores[index]
            slope = arithmetic.gradient(slope * weight, score)
            scores.append(arithmetic.perturbed(score, slope, self.perturb_scores))
        for index, weight, mask in zip(active, dense, self._masks_by(active, scores), strict=True):
            variable = tensor_variable(self.targets[index].variable)
            strategy.extended.update(variable, _assign_masked, args=(weight, mask))

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, optimizer: Any, gradients_and_variables: Any) -> Any:
        r"""Take an optimizer step on the scores, and choose the weights to keep by them.

        For your own training loop, in place of `optimizer.apply_gradients`.

        Args:
            optimizer: an optimizer of the model's Keras.
            gradients_and_variables: pairs of a gradient and a variable of the model; those of
                kernels are the gradients of :math:`w \odot m`.

        Returns:
            What the optimizer's `apply_gradients` returns.
        """
        with self.training(optimizers.require(optimizer)):
            return optimizer.apply_gradients(optimizers.require_pairs(gradients_and_variables))

    def _on_step(self, optimizer: Any, pairs: optimizers.Pairs, step: Any) -> Any:
        """Take an optimizer step on the scores.

        During the step the kernels' variables hold the scores, so that the optimizer's variables
        (momenta, averages) and updates (weight decay) are for the scores.

        Args:
            optimizer: an optimizer of either Keras.
            pairs: gradients and variables, see `apply_gradients`.
            step: the optimizer's own step, `step(pairs)`.
        """
        kernels = {optimizers.key(target.variable) for target, _, _ in self.triples()}
        is_ours = any(optimizers.key(variable) in kernels for _, variable in pairs)
        if not (self.is_attached and is_ours):
            return step(pairs)
        self._require_followed(optimizer)
        # Otherwise a step without data, at the end of a dataset, would leave scores in the kernels.
        with depending_on([gradient for gradient, _ in pairs if gradient is not None]):
            if tf.executing_eagerly():
                self._reset_if_new(optimizer)
            self._known.add(optimizer)
            self._is_used = True
            optimizers.build(optimizer, [variable for _, variable in pairs])
            factors = {optimizers.key(t.variable): (dense, s) for t, dense, s in self.triples()}
            others = _frozen_others(self.model, self.also_train) - set(factors)
            products = arithmetic.products(pairs, factors)
            slopes = self._shares and self._shares.gradients(optimizer, products)
            trained = arithmetic.gradients(pairs, products, factors, others)
            update_everywhere(self.model, lambda strategy: self._load_scores(strategy, optimizer))
            self._running_steps += 1
            try:
                result = step(trained)
            except BaseException:  # also an interrupt
                if tf.executing_eagerly():
                    self.apply()  # the kernels still hold the scores
                raise
            finally:
                self._running_steps -= 1
            if self._shares is not None:
                self._shares.update(self.model, self._active(), slopes)
            self._step(optimizer, True)
        return result

    def _require_followed(self, optimizer: Any) -> None:
        """Raise a ValueError if this step can't train the shares, or lacks the perturbation."""
        accumulated = getattr(optimizers.innermost(optimizer), "gradient_accumulation_steps", None)
        if self._shares is not None and accumulated:
            raise ValueError(
                "gradient_accumulation_steps must be None with scope="
                f"{self._selection.scope!r}, got {accumulated}: the shares take a step for each "
                "batch. Take larger batches, or another scope."
            )
        if self.perturb_scores and not self._perturbations:
            raise ValueError(
                f"perturb_scores={self.perturb_scores:g} needs a second gradient in each step, "
                "which Keras' own fit does not compute: train by AdversarialTraining, or compute "
                "the gradients of your own loop in the context pruner.perturbed(loss)."
            )

    def _reset_shares(self, masks_of: Callable[[list[int]], list[tf.Tensor]]) -> None:
        """Reset learned shares, if there are any, to those of masks.

        Args:
            masks_of: returns the masks of some of the targets, given by their indices.
        """
        active = self._active()
        if self._shares is not None and active:
            self._shares.reset(active, masks_of(active))

    def _first_masks(self, indices: list[int]) -> list[tf.Tensor]:
        """Return the masks of some targets by the scope `Learned.start`."""
        alive, values = self._ranked(indices)
        return self._selection.only(indices).masks(self._asked, alive, values)

    def _masks_by(self, indices: list[int], scores: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return the masks of some targets by given scores, one tensor for each."""
        alive, _ = self._ranked(indices)
        scope = None if self._shares is None else self._shares.scope(indices)
        return self._selection.only(indices).masks(self._asked, alive, scores, scope)

    def _on_finalize(self, finalize: Any) -> None:
        """Replace the scores by the optimizer's averages of them, and choose the masks again."""
        if not self.is_attached:
            finalize()
            return
        for target, _, score in self.triples():
            tensor_variable(target.variable).assign(score)
        finalize()
        for target, _, score in self.triples():
            score.assign(tensor_variable(target.variable))
        self.choose()

    def _load_scores(self, strategy: Any, optimizer: Any) -> None:
        """Assign the scores to the kernels' variables, for the optimizer."""
        has_steps = optimizers.iterations(optimizer) > 0

        def reset() -> None:
            for target, _, score in self.triples():
                optimizers.reset_companions(strategy, optimizer, target.variable, score, has_steps)

        tf.cond(tf.identity(tensor_variable(self.state.seen)) < 0, reset, lambda: None)
        for target, _, score in self.triples():
            strategy.extended.update(tensor_variable(target.variable), assign, args=(score,))

    def constrain(self, weight: tf.Tensor, mask: Any, own: Any) -> Any:  # noqa: ARG002
        """Return the scores after an optimizer step, unchanged.

        Raises:
            RuntimeError: it was a step on the kernels.
        """
        if not self._running_steps:
            raise RuntimeError(self._bypassed())
        return weight

    def _bypassed(self) -> str:
        return (
            f"an optimizer step has changed the kernels of model {self.model.name!r}, whose scores "
            "are trained in place of the kernels. Train it by its own fit, by AdversarialTraining, "
            "as a part of another model with pruning_callbacks(), or by apply_gradients of its "
            "pruner. Compile every model again that was trained before this one was pruned."
        )

    @tf.autograph.experimental.do_not_convert
    def step(self, optimizer: Any = None, *, is_constrained: bool = False) -> None:  # noqa: ARG002
        """Check that no optimizer step has bypassed the scores.

        Raises:
            RuntimeError: a step has changed the kernels; the change is lost.
        """
        optimizer = self.own_optimizer() if optimizer is None else optimizers.require(optimizer)
        self._require_intercepted(optimizer, self._bypassed())

    def step_function(self, optimizer: Any) -> Callable[[], None]:
        """Return `step` for an optimizer, for many calls."""
        return functools.partial(self.step, optimizer)

    def on_weights_set(self) -> None:
        """Use weights that were set from outside as dense weights, and initialise their scores.

        Where they are zero, the dense weights do not change, and rank last. Kernels that were not
        changed keep their scores.

        Raises:
            ValueError: a kernel is all zero or not finite.
        """
        pairs = zip(self._held_pairs(), self.triples(), strict=True)
        changed = [
            (target, dense, score)
            for (_, mask), (target, dense, score) in pairs
            if tf.reduce_any(tensor_variable(target.variable) != kept(dense, mask))
        ]
        try:
            for target, _, _ in changed:
                _require_rankable(target, "the weights that were set")
        except ValueError:
            self.apply()  # restores the kernels
            raise
        for target, dense, score in changed:
            given = tf.convert_to_tensor(tensor_variable(target.variable))
            alive = tf.not_equal(given, 0)
            smallest = tf.reduce_min(tf.where(alive, tf.abs(given), given.dtype.max))
            below = dense * tf.math.divide_no_nan(0.5 * smallest, tf.reduce_max(tf.abs(dense)))
            score.assign(arithmetic.initial(tf.where(alive, given, below), target))
            dense.assign(tf.where(alive, given, dense))
        if changed:
            alive = [tf.not_equal(tensor_variable(each.variable), 0) for each in self.targets]
            self._reset_shares(lambda indices: self._given_masks(indices, alive))
            self.choose()

    def _given_masks(self, indices: list[int], alive: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return `alive` of some targets if it has the sparsity asked for, else the first masks."""
        given = [alive[index] for index in indices]
        total = sum(self.targets[index].size for index in indices)
        count = sum(int(tf.math.count_nonzero(mask)) for mask in given)
        is_as_asked = count == int(functional.kept_count(total, self._asked))
        return given if is_as_asked else self._first_masks(indices)

    def freeze(self) -> None:
        """End the training of scores: freeze the masks, and let the weights be trained again.

        The model then has a frozen `Pruner`. The optimizers' variables for the scores are reset.
        """
        self.choose()
        super().freeze()
        model, kept = self.model, [mask.numpy() for mask in self.state.masks]
        self.detach()
        pruner = Pruner.of_masks(
            model,
            self._found,
            kept,
            self.schedule.sparsity,
            structure=self.structure,
            scope=self._selection.scope,
            min_weights=self._selection.min_weights,
        )
        pruner.state.step.assign(self.steps)

    def detach(self) -> None:
        """Remove the pruner from its model, and reset the optimizers' variables for the scores."""
        known = set(self._known)
        for model in (self.model, *trainers(self.model)):
            known.update(optimizers.held(model))
        super().detach()
        if not self.steps:
            return

        def reset(strategy: Any) -> None:
            for optimizer in known:
                for target in self.targets:
                    weight = target.variable
                    optimizers.reset_companions(strategy, optimizer, weight, weight)

        update_everywhere(self.model, reset)

    def finalize(self) -> None:
        """Do the same as `freeze`."""
        self.freeze()

    def choose(self) -> None:
        """Choose the masks by the present scores, and assign the kept weights to the kernels."""

        def update(strategy: Any) -> None:
            self._renew(strategy, tf.constant(self._asked))
            self._mask_weights(strategy)

        update_everywhere(self.model, update)

    def _update(
        self, strategy: Any, optimizer: Any, is_constrained: bool, gradients: Any = None
    ) -> None:
        for target, _, score in self.triples():
            variable = tensor_variable(target.variable)
            strategy.extended.update(score, assign, args=(variable,))
        super()._update(strategy, optimizer, is_constrained, gradients)
        self._mask_weights(strategy)

    def _ranked(self, indices: list[int]) -> tuple[list[Any], list[Any] | None]:
        alive = [tf.ones(self.targets[index].shape, tf.bool) for index in indices]
        return alive, [self.state.scores[index] for index in indices]

    def _mask_weights(self, strategy: Any) -> None:
        for (_, mask), (target, dense, _) in zip(self._held_pairs(), self.triples(), strict=True):
            variable = tensor_variable(target.variable)
            strategy.extended.update(variable, _assign_masked, args=(dense, mask))

    @tf.autograph.experimental.do_not_convert  # AutoGraph fails on a body of a docstring only
    def _mask_companions(self, strategy: Any, optimizer: Any) -> None:
        """Do nothing: the optimizer's variables are for scores, also of pruned weights."""

    def get_config(self) -> dict[str, Any]:
        """Return the configuration of the pruner; its variables are saved separately."""
        return {
            "sparsity": self.schedule.sparsity,
            "frequency": self.frequency,
            "also_train": self.also_train,
            "perturb_scores": self.perturb_scores,
            **self._selection_config(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], *, model: Any) -> Self:
        """Attach the pruner of a configuration to `model`.

        Raises:
            ValueError: the model lacks a weight that was pruned.
        """
        return cls(
            model,
            config["sparsity"],
            frequency=config["frequency"],
            also_train=config["also_train"],
            perturb_scores=config.get("perturb_scores", 0.0),  # older files lack it
            **deserialize_selection(config, model),
        )

    def __repr__(self) -> str:
        return (
            f"ScorePruner({self.model.name!r}, {self.schedule.sparsity:g}, "
            f"frequency={self.frequency}, also_train={self.also_train!r}, "
            f"perturb_scores={self.perturb_scores:g}, structure={self.structure!r}, "
            f"scope={self._selection.scope!r}, "
            f"min_weights={self._selection.min_weights})"
        )


@dataclasses.dataclass(frozen=True)
class Every:
    """A schedule of constant sparsity that renews the masks every `frequency` steps."""

    sparsity: float
    frequency: int

    def __call__(self, step: Any) -> tuple[tf.Tensor, float]:
        """Return whether to renew the masks at this step, and the sparsity."""
        return tf.equal((tf.cast(step, tf.int64) - 1) % self.frequency, 0), self.sparsity


def _unfit(structure: Any, layers: Any) -> Callable[[Target], str]:
    """Return a function that returns why a weight can't be pruned by scores, or an empty text."""
    structure_reason = structures.unfit(structure, layers)

    def reason(target: Target) -> str:
        constraint = masks.own_constraint(target.variable)
        if constraint is not None:
            return (
                f"its constraint {type(constraint).__name__} would act on the scores, which are "
                "trained in place of the weights"
            )
        return structure_reason(target)

    return reason


def _require_no_lora(layers: Iterable[Any]) -> None:
    """Raise a ValueError if a layer has LoRA enabled: its kernel gets no gradient."""
    if names := [layer.name for layer in layers if kernel_layers.has_lora(layer)]:
        raise ValueError(
            "method='scores' needs layers without LoRA, which freezes their kernels and trains "
            f"two factors in their place; it is enabled in {', '.join(names)}. save_weights writes "
            "the sums: load them into a model without LoRA, and prune that one."
        )


def _require_rankable(target: Target, where: str) -> None:
    """Raise a ValueError if a kernel is all zero or not finite."""
    largest = float(np.max(np.abs(tensor_variable(target.variable).numpy())))  # NaN if there is any
    if not 0.0 < largest < math.inf:
        raise ValueError(
            f"{where}: kernel {target.name!r} has max|w| = {largest:g}, so its weights can't be "
            "ranked. Scores are for a trained network: train or load it first, or leave this "
            "kernel out by layers=."
        )


def _frozen_others(model: Any, also_train: str) -> set[Any]:
    """Return the keys of the trainable variables that `also_train` excludes."""
    if also_train == "all":
        return set()
    trained: set[Any] = set()
    if also_train == "normalization":
        for layer in kernel_layers.flatten(model):
            if kernel_layers.is_normalization(layer):
                trained |= {optimizers.key(variable) for variable in layer.trainable_variables}
    return {optimizers.key(variable) for variable in model.trainable_variables} - trained


def _assign_masked(variable: Any, dense: Any, mask: Any) -> Any:
    """Set a variable to dense weights, and to zero where their mask is False."""
    return variable.assign(kept(dense, mask))
