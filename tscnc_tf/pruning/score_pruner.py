"""Pruning by importance scores that are trained: the second way of the mask engine (HYDRA)."""

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
from tscnc_tf._keras import adapted, flavours, masks, optimizers
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras.flavours import depending_on, tensor_variable, trainers, update_everywhere
from tscnc_tf._keras.masks import kept
from tscnc_tf._keras.optimizers import assign
from tscnc_tf.pruning import learned, structures
from tscnc_tf.pruning import scores as arithmetic
from tscnc_tf.pruning.learned import Learned
from tscnc_tf.pruning.pruner import Pruner
from tscnc_tf.pruning.structures import Structure
from tscnc_tf.pruning.targets import Target, candidates, require_model

__all__ = ["ScorePruner"]

_ALSO_TRAIN = ("normalization", "all", "none")


@_keras.register
class ScorePruner(Pruner):
    r"""Learns which weights to keep, by a score for each, while the weights stay as they are.

    Of each kernel :math:`w` the k weights with the largest :math:`|s|` act, and the others are
    zero: the kernel of the layer is :math:`w \odot m`, :math:`m = 1[|s| \in \text{top } k]`, after
    every step, and exactly k weights are kept, ties or not. What training changes is s. It begins
    as

    .. math:: s = \sqrt{6/\text{fan-in}}\; w / \max|w|

    so at first the largest weights act. The gradient passes the choice as if it were the identity
    (straight-through), and :math:`|s|` as it is:

    .. math:: \partial L/\partial s = \partial L/\partial(w\odot m) \odot w \odot \text{sign}(s)

    It is there for weights that are zero at present, too: so they can come back. (A kernel's sign
    is that of s at first; without the last factor a negative score would fall in magnitude just
    where its weight is of use.)

    The model is given the pruner in place, as with `Pruner`, and is pruned at once. From then on
    its `fit`, and `AdversarialTraining`, train the scores in place of the kernels: the optimizer
    sees the kernels' gradients as those of the scores, with its momentum, clipping, loss scale,
    weight decay (of scores) and moving averages (of scores; where Keras puts these in place of the
    weights, they become the scores, and the masks are chosen by them). Penalties on kernels, such
    as `TSCNC`, are part of the loss. A loop of your own calls `apply_gradients` of this pruner in
    place of the optimizer's; for a model inside another one, `callbacks.pruning_callbacks()` do
    it. Weights that are set or loaded from outside (`set_weights`, `load_weights`) become the dense
    ones, and their scores are initialised again. Keras' `SwapEMAWeights` does not work here: it
    would put scores in place of weights. Where the stage is begun by a callback of `fit` and the
    optimizer has averages, `use_ema=True`, give `callbacks.pruning_callbacks()`, too.

    After the stage, `pruning.freeze_mask(model)` ends it: the mask stays for good, the weights
    :math:`w \odot m` are trained again, and the model's pruner is a frozen `Pruner`. Compile the
    model anew for it. `strip` ends it without more.

    Dense weights and scores take twice the memory of the kernels, in `.keras` files too, until
    then. All else is as with `Pruner`.

    Args:
        model: a built model of either Keras, trained already, subclassed ones too.
        sparsity: fraction of zeros, in [0, 1).
        frequency: number of optimizer steps from one choice of the masks to the next, >= 1. A
            choice takes some 30 passes over the scores; in between, the masks are those of the last
            one. Where the stage ends, they are chosen once more.
        also_train: what is trained beside the scores: "normalization" (γ and β of normalization
            layers, as in the authors' code), "all" that is trainable, biases and kernels that are
            not pruned among them, or "none". Moving statistics of BatchNorm follow the data as in
            any training, whichever it is.
        layers: which layers, as in `Pruner`.
        weights: a pattern for the names of weights, as in `Pruner`.
        min_rank: the smallest rank of a weight to prune.
        structure: as in `Pruner`; a unit is worth the mean of its weights' :math:`|s|`.
        scope: as in `Pruner`; or "learned", or `Learned()` with options: the shares of the layers
            are trained, together with the scores.
        min_weights: the number of weights that every weight tensor keeps at least.
        perturb_scores: the radius of a step on the scores *against* training before each step of
            theirs, relative to the norm of the scores of each weight tensor, >= 0; 0 for none. See
            `perturbed`.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: the model is not built or has a pruner already, nothing is left to prune, a
            kernel is all zero or not finite, a layer has LoRA enabled, or an argument is out of
            range.

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
            scope=learned.option(scope),
            min_weights=min_weights,
        )
        if is_new:
            self._begin_new()
        self.choose()

    def _set_up(self, *arguments: Any, **options: Any) -> None:
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers that took a step
        self._steps_under_way = 0  # of optimizers, on scores in the kernels' place; one a replica
        self._perturbations = 0  # that act at present; one a replica
        super()._set_up(*arguments, **options)
        scope = self._selection.scope
        if isinstance(scope, Learned):
            least = self._selection.min_weights
            self._shares = learned.TrainedShares(
                scope, self.targets, self._asked, least, self.state
            )
        self._initialise()

    def begin(self) -> None:
        """Begin the stage with the kernels as they are: as dense weights, and for first scores.

        The constructor does so. Called again, it discards the trained scores. It consists of
        TensorFlow operations, for a program that is given the weights later.
        """
        self._initialise()
        self.choose()

    def _initialise(self) -> None:
        for target, dense, score in self.triples():
            weight = tf.convert_to_tensor(tensor_variable(target.variable))
            dense.assign(weight)
            score.assign(arithmetic.initial(weight, target))
        self._begin_shares(self._first_masks)

    def _new_state(self, *_: Any) -> Any:
        dtypes = [tf.as_dtype(tensor_variable(t.variable).dtype).name for t in self.targets]
        return super()._new_state(dtypes, has_shares=isinstance(self._selection.scope, Learned))

    def triples(self) -> list[tuple[Target, Any, Any]]:
        """Return (target, variable of its dense weights, variable of its scores) for each."""
        dense, scores = self.state.dense, self.state.scores
        return [(self.targets[index], dense[index], scores[index]) for index in self._held()]

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the weights to keep by name, as trained so far, if they are `Learned`.

        What the layers keep is in proportion to them; `pruning.report` has that.
        """
        return {} if self._shares is None else self._shares.named(self._held())

    @property
    def frequency(self) -> int:
        """The number of optimizer steps from one choice of the masks to the next."""
        return self.schedule.frequency

    def training(self, optimizer: Any = None) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which an optimizer trains the scores in place of the kernels.

        `fit`, `AdversarialTraining` and the callbacks enter it by themselves.

        Args:
            optimizer: None for all that the model holds.

        Raises:
            ValueError: LoRA was enabled in a layer whose scores are to be trained.
        """
        _require_no_lora(target.layer for target in self.targets)
        stack = contextlib.ExitStack()
        for each in optimizers.held(self.model) if optimizer is None else [optimizer]:
            stack.enter_context(optimizers.intercept(each, self._on_step, self._on_finalize))
        return stack

    @contextlib.contextmanager
    def perturbed(self, loss: Callable[[], tf.Tensor]) -> Iterator[None]:
        r"""Let other weights act in the block, for a gradient that is more robust in the scores.

        Those are the largest after one step on the scores of each weight tensor that raises a loss,

        .. math:: s + \rho\, \|s\|_2\, g / \|g\|_2, \qquad g = \partial L / \partial s

        with :math:`\rho` = `perturb_scores`. The scores themselves stay; the next step on them uses
        the gradient that is computed in the block, and brings back the weights that they choose.

        `AdversarialTraining` does so in each step. It costs one more training pass (forward and
        backward) and one more choice of the weights. Keras' own `fit` can't, and refuses. A loop of
        your own computes its gradients in this block, and calls `apply_gradients` there.

        Args:
            loss: computes the value to descend, a scalar. What else it changes (moving statistics,
                seeds of Dropout) is put back.
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
            self.model, lambda strategy: self._act_uphill(strategy, active, gradients)
        )
        self._perturbations += 1
        try:
            yield
        except BaseException:  # an interrupt, too
            if tf.executing_eagerly():
                self.apply()
            raise
        finally:
            self._perturbations -= 1

    def _act_uphill(self, strategy: Any, active: list[int], gradients: list[tf.Tensor]) -> None:
        """Let the weights act that perturbed scores choose, of some targets."""
        dense, uphill = [self.state.dense[index] for index in active], []
        for index, weight, slope in zip(active, dense, gradients, strict=True):
            score = self.state.scores[index]
            slope = arithmetic.gradient(slope * weight, score)
            uphill.append(arithmetic.uphill(score, slope, self.perturb_scores))
        for index, weight, mask in zip(active, dense, self._masks_by(active, uphill), strict=True):
            variable = tensor_variable(self.targets[index].variable)
            strategy.extended.update(variable, _act, args=(weight, mask))

    @tf.autograph.experimental.do_not_convert
    def apply_gradients(self, optimizer: Any, gradients_and_variables: Any) -> Any:
        """Take an optimizer's step on the scores, and choose the weights to keep by them.

        For a training loop of your own, in place of `optimizer.apply_gradients`.

        Args:
            optimizer: of the model's Keras.
            gradients_and_variables: pairs of a gradient and a variable of the model, kernels as
                they are in the model.

        Returns:
            What the optimizer's `apply_gradients` returns.
        """
        with self.training(optimizer):
            return optimizer.apply_gradients(gradients_and_variables)

    def _on_step(self, optimizer: Any, pairs: optimizers.Pairs, step: Any) -> Any:
        """Let an optimizer take its step on scores.

        While it acts, the kernels' variables hold the scores: so all that it keeps for them
        (momenta, averages), and all that it does to them (weight decay), is for the scores.

        Args:
            optimizer: of either Keras.
            pairs: of gradients and weights, those of kernels as they act.
            step: the optimizer's own step, `step(pairs)`.
        """
        kernels = {optimizers.key(target.variable) for target, _, _ in self.triples()}
        is_ours = any(optimizers.key(variable) in kernels for _, variable in pairs)
        if not (self.is_attached and is_ours):
            return step(pairs)
        self._require_followed(optimizer)
        # A step without data, at the end of a dataset, would leave the scores in the kernels.
        with depending_on([gradient for gradient, _ in pairs if gradient is not None]):
            if tf.executing_eagerly():
                self._reset_if_new(optimizer)
            self._known.add(optimizer)
            self._is_used = True
            optimizers.build(optimizer, [variable for _, variable in pairs])
            factors = {optimizers.key(t.variable): (dense, s) for t, dense, s in self.triples()}
            others = _frozen_others(self.model, self.also_train) - set(factors)
            products = arithmetic.products(pairs, factors)
            slopes = self._shares and self._shares.slopes(optimizer, products)
            trained = arithmetic.gradients(pairs, products, factors, others)
            update_everywhere(self.model, lambda strategy: self._load_scores(strategy, optimizer))
            self._steps_under_way += 1
            try:
                result = step(trained)
            except BaseException:  # an interrupt, too
                if tf.executing_eagerly():
                    self.apply()  # the kernels hold scores at this moment
                raise
            finally:
                self._steps_under_way -= 1
            if self._shares is not None:
                self._shares.move(self.model, self._active(), slopes)
            self._step(optimizer, True)
        return result

    def _require_followed(self, optimizer: Any) -> None:
        """Raise if an optimizer's step can't be followed by what is trained beside scores."""
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

    def _begin_shares(self, masks_of: Callable[[list[int]], list[tf.Tensor]]) -> None:
        """Let learned shares begin as what masks keep.

        Args:
            masks_of: returns the masks of some of the targets, given by their places.
        """
        active = self._active()
        if self._shares is not None and active:
            self._shares.begin(active, masks_of(active))

    def _first_masks(self, indices: list[int]) -> list[tf.Tensor]:
        """Return the masks that the start of learned shares chooses."""
        alive, judged = self._ranked(indices)
        return self._selection.only(indices).masks(self._asked, alive, judged)

    def _masks_by(self, indices: list[int], scores: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return the masks that scores choose, one tensor for each of these targets."""
        alive, _ = self._ranked(indices)
        scope = None if self._shares is None else self._shares.scope(indices)
        return self._selection.only(indices).masks(self._asked, alive, scores, scope)

    def _on_finalize(self, finalize: Any) -> None:
        """Let an optimizer put its averages in place of scores."""
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
        past = optimizers.iterations(optimizer) > 0

        def begin() -> None:
            for target, _, score in self.triples():
                optimizers.reset_companions(strategy, optimizer, target.variable, score, past)

        tf.cond(tf.identity(tensor_variable(self.state.seen)) < 0, begin, lambda: None)
        for target, _, score in self.triples():
            strategy.extended.update(tensor_variable(target.variable), assign, args=(score,))

    def constrain(self, weight: tf.Tensor, mask: Any, own: Any) -> Any:  # noqa: ARG002
        """Return what an optimizer's step has made of scores.

        Raises:
            RuntimeError: it was a step on the kernels.
        """
        if not self._steps_under_way:
            raise RuntimeError(self._bypassed())
        return weight

    def _bypassed(self) -> str:
        return (
            f"an optimizer step has changed the kernels of model {self.model.name!r}, which are "
            "not what is trained while scores are. Train it by its own fit, by "
            "AdversarialTraining, as a part of another model with pruning_callbacks(), or by "
            "apply_gradients of its pruner; and compile anew what was trained before it was pruned."
        )

    @tf.autograph.experimental.do_not_convert
    def step(self, optimizer: Any = None, *, is_constrained: bool = False) -> None:  # noqa: ARG002
        """Check that no optimizer step has bypassed the scores; there is nothing else to do.

        Raises:
            RuntimeError: one has changed the kernels, whose change is lost.
        """
        optimizer = self.own_optimizer() if optimizer is None else optimizer
        if self._is_bypassed(optimizer):
            raise RuntimeError(self._bypassed())

    def step_function(self, optimizer: Any) -> Callable[[], None]:
        """Return `step` for an optimizer, to be called many times."""
        return functools.partial(self.step, optimizer)

    def on_weights_set(self) -> None:
        """Use weights that were set from outside as dense ones, and initialise their scores again.

        Where they are zero, the dense weights stay what they were, and rank last. What is as the
        pruner has it is unchanged.

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
            self.apply()  # nothing has been set
            raise
        for target, dense, score in changed:
            given = tf.convert_to_tensor(tensor_variable(target.variable))
            alive = tf.not_equal(given, 0)
            least = tf.reduce_min(tf.where(alive, tf.abs(given), given.dtype.max))
            below = dense * tf.math.divide_no_nan(0.5 * least, tf.reduce_max(tf.abs(dense)))
            score.assign(arithmetic.initial(tf.where(alive, given, below), target))
            dense.assign(tf.where(alive, given, dense))
        if changed:
            alive = [tf.not_equal(tensor_variable(each.variable), 0) for each in self.targets]
            self._begin_shares(lambda indices: self._given_masks(indices, alive))
            self.choose()

    def _given_masks(self, indices: list[int], alive: list[tf.Tensor]) -> list[tf.Tensor]:
        """Return the masks of weights that were set, if these are as sparse as asked for."""
        given = [alive[index] for index in indices]
        total = sum(self.targets[index].size for index in indices)
        kept_now = sum(int(tf.math.count_nonzero(mask)) for mask in given)
        is_as_asked = kept_now == int(functional.kept_count(total, self._asked))
        return given if is_as_asked else self._first_masks(indices)

    def freeze(self) -> None:
        """End the stage: keep the masks for good, and let the weights be trained again.

        The model's pruner is from now on a frozen `Pruner`. What the optimizers keep for the
        scores is reset.
        """
        self.choose()
        super().freeze()
        model, kept = self.model, [mask.numpy() for mask in self.state.masks]
        known = set(self._known)
        for each in (model, *trainers(model)):
            known.update(optimizers.held(each))
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

        def reset(strategy: Any) -> None:
            for optimizer in known:
                for target in self.targets:
                    weight = target.variable
                    optimizers.reset_companions(strategy, optimizer, weight, weight)

        update_everywhere(model, reset)

    def finalize(self) -> None:
        """End the stage, as `freeze` does."""
        self.freeze()

    def choose(self) -> None:
        """Choose the weights to keep by the scores as they are, and let them act."""

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
        anything = [tf.ones(self.targets[index].shape, tf.bool) for index in indices]
        return anything, [self.state.scores[index] for index in indices]

    def _mask_weights(self, strategy: Any) -> None:
        for (_, mask), (target, dense, _) in zip(self._held_pairs(), self.triples(), strict=True):
            variable = tensor_variable(target.variable)
            strategy.extended.update(variable, _act, args=(dense, mask))

    @tf.autograph.experimental.do_not_convert  # it can't read a body that is a docstring only
    def _mask_companions(self, strategy: Any, optimizer: Any) -> None:
        """Leave what an optimizer keeps for scores as it is: what is pruned may come back."""

    def get_config(self) -> dict[str, Any]:
        """Return what brings the pruner back, given the same model; its state is saved beside."""
        return {
            "sparsity": self.schedule.sparsity,
            "frequency": self.frequency,
            "also_train": self.also_train,
            "perturb_scores": self.perturb_scores,
            **self._shared_config(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], *, model: Any) -> Self:
        """Give `model` the pruner that `get_config` described.

        Raises:
            ValueError: the model lacks a weight that was pruned.
        """
        return cls(
            model,
            config["sparsity"],
            frequency=config["frequency"],
            also_train=config["also_train"],
            perturb_scores=config.get("perturb_scores", 0.0),  # older files lack it
            **cls._shared_options(config, model),
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
    """The schedule of one sparsity throughout; masks are chosen every so many steps."""

    sparsity: float
    frequency: int

    def __call__(self, step: Any) -> tuple[tf.Tensor, float]:
        """Return whether to choose the masks anew at this step, and the sparsity."""
        return tf.equal((tf.cast(step, tf.int64) - 1) % self.frequency, 0), self.sparsity


def _unfit(structure: Any, layers: Any) -> Callable[[Target], str]:
    """Return a function that says why a weight is not pruned by scores, if it is not."""
    otherwise = structures.unfit(structure, layers)

    def reason(target: Target) -> str:
        constraint = masks.own_constraint(target.variable)
        if constraint is not None:
            return (
                f"its constraint {type(constraint).__name__} would act on the scores, which are "
                "what is trained"
            )
        return otherwise(target)

    return reason


def _require_no_lora(layers: Iterable[Any]) -> None:
    """Raise a ValueError if one of some layers has LoRA enabled, whose kernels get no gradients."""
    if names := [layer.name for layer in layers if adapted.has_lora(layer)]:
        raise ValueError(
            "method='scores' needs layers without LoRA, which freezes their kernels and trains "
            f"two factors in their place; it is enabled in {', '.join(names)}. save_weights writes "
            "the sums: load them into a model without LoRA, and prune that one."
        )


def _require_rankable(target: Target, where: str) -> None:
    """Raise a ValueError if a kernel is all zero, or holds what is no number."""
    largest = float(np.max(np.abs(tensor_variable(target.variable).numpy())))  # NaN if there is any
    if not 0.0 < largest < math.inf:
        raise ValueError(
            f"{where}: kernel {target.name!r} has max|w| = {largest:g}, so there is nothing to "
            "rank its weights by. Scores are for a network that has been trained: train or load "
            "it first, or leave this kernel out by layers=."
        )


def _frozen_others(model: Any, also_train: str) -> set[Any]:
    """Return the keys of a model's weights that are frozen while scores are trained."""
    if also_train == "all":
        return set()
    trained: set[Any] = set()
    if also_train == "normalization":
        for layer in kernel_layers.flatten(model):
            if kernel_layers.is_normalization(layer):
                trained |= {optimizers.key(variable) for variable in layer.trainable_variables}
    return {optimizers.key(variable) for variable in model.trainable_variables} - trained


def _act(variable: Any, dense: Any, mask: Any) -> Any:
    """Set a variable to dense weights, and to zero where their mask is False."""
    return variable.assign(kept(dense, mask))
