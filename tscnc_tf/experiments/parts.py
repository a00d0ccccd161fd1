"""The sections of a recipe: dataclasses whose annotations check their values."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tscnc_tf import _checks, pruning, regularizers
from tscnc_tf.datasets import resizing, splits
from tscnc_tf.datasets.augmentation import AUGMENTATIONS
from tscnc_tf.pruning import scopes

ARCHITECTURES = {
    "small-cnn": "SmallCNN",
    "lenet-5": "LeNet5",
    "vgg-8": "VGG8",
    "mobilenet-v1": "MobileNetV1",
    "mobilenet-v2": "MobileNetV2",
    "resnet-18": "ResNet18",
    "resnet-20": "ResNet20",
    "vgg-16": "VGG16",
    "wide-resnet": "WideResNet",
    "wrn-28-4": "WRN28x4",
    "wrn-28-10": "WRN28x10",
    "wrn-34-10": "WRN34x10",
    "wrn-40-4": "WRN40x4",
}
STAGES = ("train", "prune", "finetune")
ATTACKS = ("pgd", "apgd", "autoattack")
SCOPES = (*scopes.SCOPES, "condition", "learned")
SIZED = {"block": pruning.Block, "nm": pruning.NM}
STRUCTURES = ("weights", "filters", "{block: [rows, columns]}", "{nm: [n, m]}")
REGROWTH = ("fraction", "criterion", "until", "frequency", "across_layers")
LOSSES = ("trades", "madry", "mart")
WEIGHT_DECAYS = ("l2", "decoupled")

Check = Callable[[str, Any], Any]


# Checks take the name and the value of a setting; they return the value to keep, or raise.


def _one_of(*choices: str) -> Check:
    return functools.partial(_checks.one_of, choices=choices)


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _as_given(check: Check) -> Check:
    """Keep the given value, such as the fraction "8/255", instead of its number."""

    def keep(name: str, value: Any) -> Any:
        check(name, value)
        return value

    return keep


def _part_size(name: str, value: Any) -> Any:
    splits.part_size(name, value, 0)
    return value


def _image_size(_: str, value: Any) -> tuple[int, int] | None:
    return resizing.size(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a name or a path, got {value!r}.")
    return value


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of names to values, got {value!r}.")
    return value


def _patterns(name: str, value: Any) -> Any:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(each, str) for each in patterns):
        raise TypeError(f"{name} must be a name pattern or a list of them, got {value!r}.")
    return value


def _each(name: str, value: Any, check: Check) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list, got {value!r}.")
    return tuple(check(name, each) for each in value)


def _drops(name: str, value: Any) -> tuple[float, ...]:
    drops = _each(name, value, functools.partial(_checks.number, above=0.0, below=1.0))
    if list(drops) != sorted(set(drops)):
        raise ValueError(f"{name} must rise, got {list(drops)}.")
    return drops


def _scope(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        return _checks.one_of(name, value, SCOPES)
    if not value:
        raise ValueError(f"{name} must name at least one pattern, got {{}}.")
    for pattern, sparsity in value.items():
        _checks.sparsity(f"{name}[{pattern!r}]", sparsity)
    return value


def _structure(name: str, value: Any) -> Any:
    if isinstance(value, Mapping) and len(value) == 1:
        (kind, sizes), *_ = value.items()
        if kind not in SIZED:
            raise ValueError(f"{name} must be of {', '.join(STRUCTURES)}, got {value!r}.")
        if not isinstance(sizes, Sequence) or isinstance(sizes, str) or len(sizes) != 2:
            raise ValueError(f"{name}.{kind} must be two integers, got {sizes!r}.")
        _made(f"{name}.{kind}", SIZED[kind], *sizes)
        return value
    if isinstance(value, Mapping) or value not in ("weights", "filters"):
        raise ValueError(f"{name} must be of {', '.join(STRUCTURES)}, got {value!r}.")
    return value


def _regrowth(name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping of names to values, with names of {REGROWTH}, got {value!r}."
        )
    if unknown := [key for key in value if key not in REGROWTH]:
        raise ValueError(f"{name} must have names of {REGROWTH}, got {unknown}.")
    _made(name, pruning.Regrowth, **value)
    return value


def _made(name: str, make: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Check values by making an object of them; errors begin with the setting's name."""
    try:
        make(*args, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


_positive = functools.partial(_checks.integer, minimum=1)
Count = Annotated[int, _positive]
OptionalCount = Annotated[int | None, _or_none(_positive)]
Factor = Annotated[float, _checks.factor]
Positive = Annotated[float, functools.partial(_checks.number, above=0.0)]
Momentum = Annotated[float, functools.partial(_checks.number, minimum=0.0, below=1.0)]
Share = Annotated[float, functools.partial(_checks.number, above=0.0, maximum=1.0)]
Distance = Annotated[Any, _as_given(_checks.distance)]
Flag = Annotated[bool, _checks.boolean]
CountOrZero = Annotated[int, functools.partial(_checks.integer, minimum=0)]
Sparsity = Annotated[float, _checks.sparsity]
Name = Annotated[str, _checks.file_name]
Patterns = Annotated[Any, _or_none(_patterns)]
PartSize = Annotated[float, _part_size]
Decay = Annotated[str, _one_of("steps", "cosine", "constant")]


# The types of the fields of a dataclass, by name; with include_extras=True, checks included.
hints: Callable[..., dict[str, Any]] = functools.cache(get_type_hints)


class Checked:
    """A frozen dataclass that checks its values by the annotations of its fields."""

    def __post_init__(self) -> None:
        for name, hint in hints(type(self), include_extras=True).items():
            if get_origin(hint) is Annotated:
                check = get_args(hint)[1]
                value = copy.deepcopy(getattr(self, name))  # of lists and dicts of the caller
                object.__setattr__(self, name, check(name, value))


@dataclasses.dataclass(frozen=True)
class Data(Checked):
    """The dataset.

    Args:
        dataset: a name or a path, see `tscnc_tf.datasets.load`.
        folder: the folder with the files of the dataset, for datasets that need one.
        validation: the part of the training data on which the best epoch is chosen: a fraction or
            a number of images.
        test: the fraction that becomes the test set of a dataset that has none.
        image_size: [height, width] to which images are resized; None for their own size.
        augment: augmentation, see `Dataset.training`; None for the default of the dataset.
        train_examples: number of training images to use; None for all.
        test_examples: number of test images to use, drawn by the recipe's seed; None for all.
        stream: whether images are read from their files when used, see `tscnc_tf.datasets.load`.
    """

    dataset: Annotated[str, _text] = "cifar10"
    folder: Annotated[str | None, _or_none(_text)] = None
    validation: PartSize = 0.1
    test: PartSize = 0.2
    image_size: Annotated[Any, _image_size] = None
    augment: Annotated[str | None, _or_none(_one_of(*AUGMENTATIONS))] = None
    train_examples: OptionalCount = None
    test_examples: OptionalCount = None
    stream: Flag = False


@dataclasses.dataclass(frozen=True)
class Network(Checked):
    """The network.

    Args:
        architecture: one of `ARCHITECTURES`.
        options: further arguments of the function in `tscnc_tf.applications`.
        library: "keras" or "tf_keras".
        precision: the dtype policy: "float32", "mixed_bfloat16" or "mixed_float16".
        normalize: whether the first layer normalises the inputs by mean and standard deviation of
            the training data.
    """

    architecture: Annotated[str, _one_of(*ARCHITECTURES)] = "resnet-18"
    options: Annotated[Mapping[str, Any], _mapping] = dataclasses.field(default_factory=dict)
    library: Annotated[str, _one_of("keras", "tf_keras")] = "keras"
    precision: Annotated[str, _one_of("float32", "mixed_bfloat16", "mixed_float16")] = "float32"
    normalize: Flag = True


@dataclasses.dataclass(frozen=True)
class Adversary(Checked):
    """The attack of adversarial training: PGD within an l-infinity ball.

    Args:
        epsilon: radius of the ball, a number or a fraction such as "8/255".
        step_size: length of a step, a number or a fraction.
        steps: number of steps.
    """

    epsilon: Distance = "8/255"
    step_size: Distance = 0.0069
    steps: Count = 10


@dataclasses.dataclass(frozen=True)
class Constraints(Checked):
    """The two constraints on the kernels, see `regularizers.TSCNC`.

    Args:
        sparsity_factor: factor of the sparsity constraint; 0 for off.
        condition_factor: factor of the condition number constraint; 0 for off.
        a: shape of the transformed l1 penalty, also of that on the gates.
        form: form of the condition number constraint.
        every: the condition number constraint acts in one of this many steps, see
            `regularizers.ConditionNumber`.
        layers: the constrained layers, a name pattern or a list of them; None for all.
        stages: the stages in which they act; after "train" they act on the masked kernels.
    """

    sparsity_factor: Factor = 1e-6
    condition_factor: Factor = 1e-2
    a: Positive = 1.0
    form: Annotated[str, _one_of(*regularizers.FORMS)] = "log_ratio"
    every: Count = 1
    layers: Patterns = None
    stages: Annotated[Any, functools.partial(_each, check=_one_of(*STAGES))] = ("train",)


@dataclasses.dataclass(frozen=True)
class Gates(Checked):
    """The sparsity constraint on smoothed gates in the first stage, see `gates.add_gates`.

    Args:
        sparsity_factor: factor of the constraint on the gates; 0 for no gates.
        drop_rate: initial probability that a gate is drawn below one half.
        weight_decay: penalty on the size of a group's weights.
        l0_factor: penalty on the number of a group's weights.
        layers: the layers with gates, a name pattern or a list of them; None for all.
    """

    sparsity_factor: Factor = 0.0
    drop_rate: Annotated[float, functools.partial(_checks.number, above=0.0, below=1.0)] = 0.3
    weight_decay: Factor = 5e-4
    l0_factor: Factor = 1e-6
    layers: Patterns = None


@dataclasses.dataclass(frozen=True)
class Training(Checked):
    """A stage of training: its length, its optimizer (SGD) and its loss.

    Args:
        epochs: number of epochs.
        batch_size: images per step.
        learning_rate: initial learning rate.
        decay: "steps" (times `drop` after each of `drops`), "cosine" (to zero) or "constant".
        drops: fractions of the stage after which the learning rate drops.
        drop: factor by which it drops.
        momentum: Nesterov momentum.
        weight_decay: weight decay of all trainable weights; with method "scores", of the scores.
        weight_decay_kind: "l2" (in the gradient, as in the literature and in PyTorch's SGD, see
            `training.SGDWithL2`), which the recipes of this package use; or "decoupled" (apart from
            the momentum, as in Keras; at momentum 0.9 the same number has a tenth of the effect),
            the default of a recipe.
        average: momentum of the moving averages of the weights, which are validated and kept; 0 for
            none. Masked entries stay zero; the statistics of BatchNorm are not averaged.
        average_from: number of epochs before the averages begin, at the weights of that time; until
            then the weights themselves are validated and kept.
        awp: gamma of the adversarial weight perturbation, see `training.AWP`; 0 for none.
        awp_from: number of epochs before it begins; the step is compiled again then.
        loss: "trades", "madry" or "mart".
        beta: factor of the robust term of TRADES and MART.
        jit_compile: whether the step is compiled by XLA.
    """

    epochs: Count = 200
    batch_size: Count = 128
    learning_rate: Positive = 0.1
    decay: Decay = "steps"
    drops: Annotated[Any, _drops] = (0.3, 0.6, 0.8)
    drop: Share = 0.2
    momentum: Momentum = 0.9
    weight_decay: Factor = 5e-4
    weight_decay_kind: Annotated[str, _one_of(*WEIGHT_DECAYS)] = "decoupled"
    average: Momentum = 0.99
    average_from: CountOrZero = 0
    awp: Factor = 0.0
    awp_from: CountOrZero = 0
    loss: Annotated[str, _one_of(*LOSSES)] = "trades"
    beta: Factor = 6.0
    jit_compile: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, usual in (("average", 0.99), ("awp", 0.005)):
            begin = getattr(self, f"{name}_from")
            if begin and not getattr(self, name):
                raise ValueError(
                    f"{name}_from must be 0 with {name}=0, which switches {name} off, got {begin}. "
                    f"Set {name}, such as {usual}."
                )
            if begin >= self.epochs:
                raise ValueError(
                    f"{name}_from must be less than epochs, {self.epochs}, got {begin}."
                )


@dataclasses.dataclass(frozen=True)
class Pruning(Training):
    """The stage in which weights are pruned.

    Args:
        method: "scores" (importance scores are trained, weights are frozen) or "magnitude" (weights
            are trained, a schedule prunes them).
        layers: the layers to prune, a name pattern or a list of them; None for all but the first
            convolution and the classifier (layers named "stem" and "logits").
        scope: as in `pruning.Pruner`; with "scores" also "learned", see `pruning.Learned`; or
            "condition": by `pruning.condition_budgets` of the dense network.
        perturb_scores: with "scores", the radius of the adversarial perturbation of the scores
            before each of their steps, see `pruning.ScorePruner`; 0 for none.
        structure: what is pruned: single "weights", whole "filters", {"block": [rows, columns]} for
            `pruning.Block`, or {"nm": [n, m]} for `pruning.NM`.
        min_weights: minimum number of weights that every layer keeps, see `pruning.Pruner`.
        min_per_filter: with structure "weights", the minimum number that every filter keeps, see
            `pruning.Unstructured`.
        min_per_input: with structure "weights", the minimum number that every input channel or unit
            keeps, see `pruning.Unstructured`.
        ramp: with "magnitude", the fraction of the stage over which the sparsity rises; 0 for the
            full sparsity at the first step.
        frequency: optimizer steps between updates of the masks; None for 50 updates in all with
            "magnitude", and one in each step with "scores".
        regrowth: with "magnitude", how pruned weights are grown back in place of others:
            `fraction`, `criterion`, `until` (of the stage), `frequency` (if not given, 50 times in
            the stage) and `across_layers` of `pruning.Regrowth`; {} for its defaults, None for
            none. With a ramp of 0 the network is sparse from the start.
    """

    epochs: Count = 20
    decay: Decay = "cosine"
    weight_decay: Factor = 0.0
    average: Momentum = 0.0
    method: Annotated[str, _one_of("scores", "magnitude")] = "scores"
    layers: Patterns = None
    scope: Annotated[Any, _scope] = "layer"
    perturb_scores: Factor = 0.0
    structure: Annotated[Any, _structure] = "weights"
    min_weights: Count = 1
    min_per_filter: CountOrZero = 0
    min_per_input: CountOrZero = 0
    ramp: Annotated[float, functools.partial(_checks.number, minimum=0.0, maximum=1.0)] = 0.6
    frequency: OptionalCount = None
    regrowth: Annotated[Any, _or_none(_regrowth)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.perturb_scores and self.awp:
            raise ValueError(
                f"awp must be 0 with perturb_scores={self.perturb_scores}, got {self.awp}: one "
                "perturbs the weights, the other the scores that choose them. Take one of them."
            )
        if self.method == "scores" and self.average:
            raise ValueError(
                f"average must be 0 with method='scores', got {self.average}: weights are frozen."
            )
        if self.method == "magnitude" and (self.scope == "learned" or self.perturb_scores):
            name = "scope" if self.scope == "learned" else "perturb_scores"
            raise ValueError(
                f"{name}={getattr(self, name)!r} is for method='scores', got method='magnitude', "
                "which trains no scores."
            )
        for name in ("min_per_filter", "min_per_input"):
            if getattr(self, name) and self.structure != "weights":
                raise ValueError(
                    f"{name} must be 0 with structure={self.structure!r}, got "
                    f"{getattr(self, name)}: it counts single weights."
                )
        if self.method == "scores" and self.regrowth is not None:
            raise ValueError(
                f"regrowth must be null with method='scores', got {self.regrowth!r}: there weights "
                "are grown back by their scores. Take method='magnitude'."
            )


@dataclasses.dataclass(frozen=True)
class FineTuning(Training):
    """The stage in which the remaining weights are trained, with fixed masks.

    Args:
        loss: "trades", "madry", "mart" or "rslad": distillation from the dense network of the first
            stage.
        recalibrate: whether each channel is first given the mean and variance that it has in the
            dense network, see `pruning.recalibrate`.
    """

    epochs: Count = 100
    learning_rate: Positive = 0.01
    decay: Decay = "cosine"
    loss: Annotated[str, _one_of(*LOSSES, "rslad")] = "trades"
    recalibrate: Flag = False


@dataclasses.dataclass(frozen=True)
class Evaluation(Checked):
    """The evaluations on the test set, and on the validation set after each epoch.

    Args:
        attack: on the test set: "autoattack"; "apgd", its first two attacks, which are much faster
            (APGD of 100 steps by cross-entropy and by the targeted DLR loss); or "pgd", by
            cross-entropy and by the margin.
        epsilon: radius of the ball; None for that of training.
        steps: steps of PGD on the test set, with attack "pgd".
        restarts: restarts of PGD on the test set, with attack "pgd".
        validation_steps: steps of PGD on the validation set after each epoch, by cross-entropy from
            a random start.
        batch_size: images per batch.
    """

    attack: Annotated[str, _one_of(*ATTACKS)] = "autoattack"
    epsilon: Annotated[Any, _or_none(_as_given(_checks.distance))] = None
    steps: Count = 50
    restarts: Count = 5
    validation_steps: Count = 10
    batch_size: Count = 256
