"""The data, networks, trainers and attacks of each stage, built from a recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tscnc_tf import (
    _keras,
    applications,
    attacks,
    datasets,
    gates,
    losses,
    pruning,
    regularizers,
)
from tscnc_tf._keras import masks
from tscnc_tf.datasets import pixels
from tscnc_tf.experiments.parts import ARCHITECTURES, SIZED, STAGES, Pruning, Training
from tscnc_tf.experiments.recipe import Recipe, errors_begin
from tscnc_tf.training import AWP, AdversarialTraining, SGDWithL2

ENDS = ("stem", "logits")  # the first convolution and the classifier, in all applications
CALIBRATION = 1024  # the number of training images on which a pruned network is recalibrated


def dataset(recipe: Recipe) -> datasets.Dataset:
    """Return the data of a recipe; errors name the values of the recipe."""
    part, seed = recipe.data, recipe.seed
    given = ", ".join(
        f"data.{field.name}={getattr(part, field.name)!r}"
        for field in dataclasses.fields(part)
        if field.name in ("dataset", "folder") or getattr(part, field.name) != field.default
    )
    with errors_begin(f"{given}: "):  # `load` and `subset` have other names for these values
        data = datasets.load(
            part.dataset,
            folder=part.folder,
            validation=part.validation,
            test=part.test,
            image_size=part.image_size,
            seed=seed,
            stream=part.stream,
        )
        if part.train_examples or part.test_examples:
            data = data.subset(part.train_examples, part.test_examples, seed=seed)
    return data


def dry_run(recipe: Recipe, data: datasets.Dataset, wanted: Sequence[str] = STAGES) -> None:
    """Build stages, with initial weights, so that errors come before the first epoch.

    Raises:
        TypeError, ValueError: a stage can't be built, or can't be evaluated: there are no images,
            or more than fit in memory.
    """
    for part in ("validation", "test"):
        if not len(getattr(data, f"y_{part}")):
            raise ValueError(
                f"data.{part} must leave images to evaluate on, got {getattr(recipe.data, part)!r}."
            )
    with errors_begin("data.test_examples: "):
        pixels.require_memory("the test part", data.x_test.shape)
    model = network(recipe, data)
    for stage in wanted:
        with errors_begin(f"{stage}: "), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the stage itself will warn
            trainer(recipe, stage, data, previous=model, teacher=model)


def library(recipe: Recipe) -> types.ModuleType:
    """Return the Keras of a recipe."""
    return _keras.LIBRARIES[recipe.network.library]


def steps(recipe: Recipe, stage: str, data: datasets.Dataset) -> int:
    """Return the number of optimizer steps of a stage."""
    settings: Training = getattr(recipe, stage)
    return data.steps_per_epoch(settings.batch_size) * settings.epochs


def network(recipe: Recipe, data: datasets.Dataset) -> Any:
    """Return the network of a recipe with its initial weights, dense and without constraints."""
    part, keras = recipe.network, library(recipe)
    mean, std = data.channel_statistics() if part.normalize else (None, None)
    with precision(keras, part.precision):
        try:
            return getattr(applications, ARCHITECTURES[part.architecture])(
                input_shape=data.image_shape,
                classes=data.classes,
                mean=mean,
                std=std,
                library=part.library,
                seed=recipe.seed,
                **part.options,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"network {part.architecture!r} can't be built for images of {data.image_shape} "
                f"with network.options={dict(part.options)}: {error}"
            ) from error


def trainer(
    recipe: Recipe,
    stage: str,
    data: datasets.Dataset,
    *,
    previous: Any = None,
    teacher: Any = None,
    kept: Mapping[str, np.ndarray] | None = None,
) -> AdversarialTraining:
    """Return the compiled trainer of a stage, before its first step.

    Args:
        recipe: of the experiment.
        stage: "train", "prune" or "finetune".
        data: of the recipe.
        previous: the model of the stage before; None for the first.
        teacher: the dense, robust model, for the loss "rslad" and for recalibration.
        kept: for "finetune", by weight, which entries are trained; None for those that are not
            zero. Weights that were just grown back are zero, too, so their masks must be given.
    """
    settings: Training = getattr(recipe, stage)
    count = steps(recipe, stage, data)
    model = network(recipe, data)
    if previous is not None:
        model.set_weights(previous.get_weights())
    model = _constrained(recipe, stage, model)
    if stage == "prune":
        model = _pruned(recipe, model, count)
    elif stage == "finetune":
        freeze(recipe, model, kept)
        if recipe.finetune.recalibrate:
            count_of_images = min(CALIBRATION, len(data.y_train))
            images = data.subset(count_of_images, seed=recipe.seed).arrays("train")[0]
            pruning.recalibrate(model, images, dense=teacher)
    made = AdversarialTraining(
        model,
        attack=attacks.PGD(
            epsilon=recipe.adversary.epsilon,
            step_size=recipe.adversary.step_size,
            steps=recipe.adversary.steps,
        ),
        loss=_loss(settings, teacher),
        awp=awp(settings, 0),
        seed=recipe.seed + 1000 * STAGES.index(stage),
        name=stage,
    )
    made.compile(optimizer=_optimizer(recipe, settings, count), jit_compile=settings.jit_compile)
    return made


def validator(recipe: Recipe, model: Any) -> AdversarialTraining:
    """Return a trainer whose `evaluate` measures accuracy on the validation set.

    Its attack is the same for every stage and loss: PGD on cross-entropy from a random start.
    """
    made = AdversarialTraining(
        model,
        attack=attacks.PGD(epsilon=epsilon(recipe), steps=recipe.evaluate.validation_steps),
        loss=losses.Madry(),
        seed=recipe.seed,
        name="validator",
    )
    made.compile(jit_compile=recipe.train.jit_compile)
    return made


def epsilon(recipe: Recipe) -> Any:
    """Return the radius of the ball of the evaluation, as written."""
    return recipe.adversary.epsilon if recipe.evaluate.epsilon is None else recipe.evaluate.epsilon


def test_attacks(recipe: Recipe) -> list[attacks.Attack]:
    """Return the attacks of the evaluation on the test set."""
    part = recipe.evaluate
    if part.attack == "autoattack":
        return [attacks.AutoAttack(epsilon=epsilon(recipe))]
    if part.attack == "apgd":
        return list(attacks.AutoAttack(epsilon=epsilon(recipe)).attacks[:2])
    return [
        attacks.PGD(
            epsilon=epsilon(recipe), steps=part.steps, restarts=part.restarts, objective=objective
        )
        for objective in ("cross_entropy", "margin")
    ]


def pruned_layers(part: Pruning) -> Any:
    """Return the layers to prune, as an argument of the functions of `pruning`."""
    return _is_inner if part.layers is None else part.layers


def plain(recipe: Recipe, data: datasets.Dataset, model: Any) -> Any:
    """Return a network with the outputs of a model, without its gates, masks and penalties."""
    made = network(recipe, data)
    made.set_weights(gates.fold(model).get_weights())
    return made


def _is_inner(layer: Any) -> bool:
    return layer.name not in ENDS


def _constrained(recipe: Recipe, stage: str, model: Any) -> Any:
    part, smooth = recipe.constraints, recipe.gates
    if stage in part.stages and (part.sparsity_factor or part.condition_factor):
        penalty = regularizers.TSCNC(
            sparsity_factor=part.sparsity_factor,
            condition_factor=part.condition_factor,
            a=part.a,
            form=part.form,
            every=part.every,
        )
        model = pruning.add_regularizers(model, penalty, layers=part.layers)
    if stage == "train" and smooth.sparsity_factor:
        model = gates.add_gates(
            model,
            layers=smooth.layers,
            drop_rate=smooth.drop_rate,
            sparsity_factor=smooth.sparsity_factor,
            weight_decay=smooth.weight_decay,
            l0_factor=smooth.l0_factor,
            a=part.a,
            seed=recipe.seed,
        )
    return model


def _pruned(recipe: Recipe, model: Any, steps: int) -> Any:
    part = recipe.prune
    options: dict[str, Any] = {
        "layers": pruned_layers(part),
        "scope": part.scope,
        "min_weights": part.min_weights,
        "structure": structure(part),
    }
    if part.scope == "condition":
        options["scope"] = pruning.condition_budgets(
            model,
            recipe.sparsity,
            layers=options["layers"],
            min_per_filter=part.min_per_filter,
        )
    if part.method == "scores":
        return pruning.prune(
            model,
            method="scores",
            sparsity=recipe.sparsity,
            frequency=part.frequency or 1,
            perturb_scores=part.perturb_scores,
            **options,
        )
    if steps < 2:
        raise ValueError(
            "method='magnitude' raises the sparsity from 0, and needs 2 optimizer steps or "
            f"more, got {steps}: raise epochs, or take a smaller batch_size."
        )
    from tscnc_tf import schedules  # imports tfmot, if it is installed

    end = max(2, round(part.ramp * steps))
    schedule: Any = schedules.CosineSparsity(
        0.0,
        recipe.sparsity,
        begin_step=1,
        end_step=end,
        frequency=part.frequency or max(1, end // 50),
    )
    if part.ramp == 0.0:
        schedule = schedules.OneShot(recipe.sparsity)
    if part.regrowth is not None:
        regrowth = {"frequency": max(1, steps // 50), **part.regrowth}
        options["regrowth"] = pruning.Regrowth(**regrowth, steps=steps, seed=recipe.seed)
    return pruning.prune(model, schedule, engine="masks", **options)


def structure(part: Pruning) -> Any:
    """Return the structure that is pruned, as an object of `pruning`."""
    if part.structure == "filters":
        return pruning.Filters()
    if part.structure == "weights":
        return pruning.Unstructured(part.min_per_filter, part.min_per_input)
    ((kind, sizes),) = part.structure.items()
    return SIZED[kind](*sizes)


def freeze(recipe: Recipe, model: Any, kept: Mapping[str, np.ndarray] | None) -> None:
    """Add fixed masks to a network: the given ones, else by its zeros."""
    pruning.freeze_mask(model, layers=pruned_layers(recipe.prune))
    if kept:
        (pruner,) = masks.pruners(model)
        for target, mask in pruner.masked_targets():
            mask.assign(kept[target.name])


def _loss(settings: Training, teacher: Any) -> losses.RobustLoss:
    if settings.loss == "madry":
        return losses.Madry()
    if settings.loss == "mart":
        return losses.MART(beta=settings.beta)
    if settings.loss == "rslad":
        return losses.RSLAD(teacher)
    return losses.TRADES(beta=settings.beta)


def awp(settings: Training, epoch: int) -> AWP | None:
    """Return the weight perturbation in an epoch of a stage, counted from 0."""
    return AWP(settings.awp) if settings.awp and epoch >= settings.awp_from else None


def _optimizer(recipe: Recipe, settings: Training, steps: int) -> Any:
    optimizers = library(recipe).optimizers
    rate: Any = settings.learning_rate
    if settings.decay == "cosine":
        rate = optimizers.schedules.CosineDecay(rate, steps)
    elif settings.decay == "steps" and settings.drops:
        rate = optimizers.schedules.PiecewiseConstantDecay(
            [round(fraction * steps) for fraction in settings.drops],
            [rate * settings.drop**power for power in range(len(settings.drops) + 1)],
        )
    options: dict[str, Any] = {"momentum": settings.momentum, "nesterov": settings.momentum > 0.0}
    if settings.average:
        options |= {"use_ema": True, "ema_momentum": settings.average}
    if settings.weight_decay and settings.weight_decay_kind == "l2":
        options |= {"weight_decay": settings.weight_decay, "library": recipe.network.library}
        return SGDWithL2(rate, **options)
    return optimizers.SGD(rate, weight_decay=settings.weight_decay or None, **options)


@contextlib.contextmanager
def precision(keras: types.ModuleType, policy: str) -> Iterator[None]:
    """Set the dtype policy, such as "mixed_float16", of layers that are made in the block."""
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(policy)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)
