"""The parts of a recipe; each checks its own values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tscnc_tf import _checks, regularizers
from tscnc_tf.datasets import resizing, splits
from tscnc_tf.datasets.augmentation import AUGMENTATIONS

ARCHITECTURES = {
    "small-cnn": "SmallCNN",
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
SCOPES = ("layer", "global", "erk", "condition")
DECAYS = ("steps", "cosine", "constant")
LOSSES = ("trades", "madry", "mart")


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned.

    Args:
        dataset: a name or a path, see `tscnc_tf.datasets.load`.
        folder: where the files of the dataset are, for those that need one.
        validation: the part of the training data that chooses the best epoch: a fraction or a
            number of examples.
        test: the fraction that becomes the test set, where the data have none.
        image_size: the size to which images are brought, [height, width]; None for as they are.
        augment: see `Dataset.training`; None for what is usual for the dataset.
        train_examples, test_examples: how many are used; None for all.
    """

    dataset: str = "cifar10"
    folder: str | None = None
    validation: float = 0.1
    test: float = 0.2
    image_size: Any = None
    augment: str | None = None
    train_examples: int | None = None
    test_examples: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, str):
            raise TypeError(f"dataset must be a name or a path, got {self.dataset!r}.")
        for name in ("validation", "test"):
            splits.part_size(name, getattr(self, name), 0)
        if self.augment is not None:
            _checks.one_of("augment", self.augment, AUGMENTATIONS)
        for name in ("train_examples", "test_examples"):
            if getattr(self, name) is not None:
                _checks.integer(name, getattr(self, name), minimum=1)
        if self.image_size is not None:
            object.__setattr__(self, "image_size", resizing.size(self.image_size))


@dataclasses.dataclass(frozen=True)
class Network:
    """What learns.

    Args:
        architecture: one of `ARCHITECTURES`.
        options: further arguments of the function of `tscnc_tf.applications`.
        library: "keras" or "tf_keras".
        precision: the dtype policy: "float32", "mixed_bfloat16" or "mixed_float16".
        normalize: whether the network begins by normalising its inputs by the mean and standard
            deviation of the training data.
    """

    architecture: str = "resnet-18"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    library: str = "keras"
    precision: str = "float32"
    normalize: bool = True

    def __post_init__(self) -> None:
        _checks.one_of("architecture", self.architecture, ARCHITECTURES)
        _checks.one_of("library", self.library, ("keras", "tf_keras"))
        _checks.one_of("precision", self.precision, ("float32", "mixed_bfloat16", "mixed_float16"))
        _checks.boolean("normalize", self.normalize)
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options must be names with values, got {self.options!r}.")


@dataclasses.dataclass(frozen=True)
class Adversary:
    """Who finds the adversarial examples that are trained on: PGD within an l-infinity ball.

    Args:
        epsilon: radius of the ball; it may be written as a fraction, "8/255".
        step_size: of each step.
        steps: how many.
    """

    epsilon: Any = "8/255"
    step_size: Any = 0.0069
    steps: int = 10

    def __post_init__(self) -> None:
        _checks.distance("epsilon", self.epsilon)
        _checks.distance("step_size", self.step_size)
        _checks.integer("steps", self.steps, minimum=1)


@dataclasses.dataclass(frozen=True)
class Constraints:
    """The two constraints on the kernels, see `regularizers.TSCNC`.

    Args:
        sparsity_factor, condition_factor: what each counts; 0 for off.
        a: the shape of the transformed l1 penalty, of that on the gates too.
        form: of the condition number constraint.
        layers: a pattern or a list of them, which layers; None for all.
        stages: in which of the stages they act. After training, they act on the masked kernels.
    """

    sparsity_factor: float = 1e-6
    condition_factor: float = 1e-2
    a: float = 1.0
    form: str = "log_ratio"
    layers: Any = None
    stages: Any = ("train",)

    def __post_init__(self) -> None:
        _checks.factor("sparsity_factor", self.sparsity_factor)
        _checks.factor("condition_factor", self.condition_factor)
        _checks.number("a", self.a, above=0.0)
        _checks.one_of("form", self.form, regularizers.FORMS)
        _require_patterns("layers", self.layers)
        object.__setattr__(self, "stages", _sequence("stages", self.stages))
        for stage in self.stages:
            _checks.one_of("stages", stage, STAGES)


@dataclasses.dataclass(frozen=True)
class Gates:
    """The sparse constraint on smoothed gates, in the first stage; see `gates.add_gates`.

    Args:
        sparsity_factor: what the constraint on the gates counts; 0 for no gates.
        drop_rate: the probability with which a gate is drawn below one half to begin with.
        weight_decay, l0_factor: what a group's weights cost, by their size and by their number.
        layers: a pattern or a list of them, which layers; None for all.
    """

    sparsity_factor: float = 0.0
    drop_rate: float = 0.3
    weight_decay: float = 5e-4
    l0_factor: float = 1e-6
    layers: Any = None

    def __post_init__(self) -> None:
        _checks.factor("sparsity_factor", self.sparsity_factor)
        _checks.number("drop_rate", self.drop_rate, above=0.0, below=1.0)
        _checks.factor("weight_decay", self.weight_decay)
        _checks.factor("l0_factor", self.l0_factor)
        _require_patterns("layers", self.layers)


@dataclasses.dataclass(frozen=True)
class Training:
    """A stage of training: its optimizer (SGD), its loss, how long it lasts.

    Args:
        epochs: how many.
        batch_size: examples a step.
        learning_rate: at the beginning.
        decay: "steps" (times `drop` after each of `drops`), "cosine" (to zero) or "constant".
        drops: after which fractions of the stage the learning rate drops.
        drop: by what factor.
        momentum: of Nesterov's kind.
        weight_decay: decoupled, on all that is trained.
        average: momentum of the moving averages of the weights that are validated and kept; 0 for
            none.
        loss: "trades", "madry" or "mart".
        beta: of TRADES and MART.
        jit_compile: whether the step is compiled by XLA.
    """

    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 0.1
    decay: str = "steps"
    drops: Any = (0.3, 0.6, 0.8)
    drop: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    average: float = 0.99
    loss: str = "trades"
    beta: float = 6.0
    jit_compile: bool = False

    def __post_init__(self) -> None:
        _checks.integer("epochs", self.epochs, minimum=1)
        _checks.integer("batch_size", self.batch_size, minimum=1)
        _checks.number("learning_rate", self.learning_rate, above=0.0)
        _checks.one_of("decay", self.decay, DECAYS)
        object.__setattr__(self, "drops", _sequence("drops", self.drops))
        for fraction in self.drops:
            _checks.number("drops", fraction, above=0.0, below=1.0)
        if list(self.drops) != sorted(set(self.drops)):
            raise ValueError(f"drops must rise, got {list(self.drops)}.")
        _checks.number("drop", self.drop, above=0.0, maximum=1.0)
        _checks.number("momentum", self.momentum, minimum=0.0, below=1.0)
        _checks.factor("weight_decay", self.weight_decay)
        _checks.number("average", self.average, minimum=0.0, below=1.0)
        _checks.one_of("loss", self.loss, self._losses())
        _checks.factor("beta", self.beta)
        _checks.boolean("jit_compile", self.jit_compile)

    @staticmethod
    def _losses() -> tuple[str, ...]:
        return LOSSES


@dataclasses.dataclass(frozen=True)
class Pruning(Training):
    """The stage in which weights are pruned.

    Args:
        method: "scores" (importance scores are trained, weights are frozen) or "magnitude" (weights
            are trained, a schedule prunes them).
        layers: a pattern or a list of them, which layers are pruned; None for all but the first
            convolution and the classifier (layers named "stem" and "logits").
        scope: as in `pruning.Pruner`, or "condition": by `pruning.condition_budgets` of the dense
            network.
        min_weights: see `pruning.Pruner`.
        min_per_filter: how many weights every filter keeps at least, see `pruning.Unstructured`.
        ramp: for "magnitude" the fraction of the stage over which the sparsity rises.
        frequency: optimizer steps between two choices of the weights to keep; None for 50 choices
            in all by "magnitude", and for one at each step by "scores".
    """

    epochs: int = 20
    decay: str = "cosine"
    weight_decay: float = 0.0
    average: float = 0.0
    method: str = "scores"
    layers: Any = None
    scope: Any = "layer"
    min_weights: int = 1
    min_per_filter: int = 0
    ramp: float = 0.6
    frequency: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.one_of("method", self.method, ("scores", "magnitude"))
        if self.method == "scores" and self.average:
            raise ValueError(
                f"average must be 0 with method='scores', got {self.average}: weights are frozen."
            )
        _checks.number("ramp", self.ramp, above=0.0, maximum=1.0)
        if self.frequency is not None:
            _checks.integer("frequency", self.frequency, minimum=1)
        _require_patterns("layers", self.layers)
        if isinstance(self.scope, Mapping):
            if not self.scope:
                raise ValueError("scope must name at least one pattern, got {}.")
            for pattern, sparsity in self.scope.items():
                _checks.sparsity(f"scope[{pattern!r}]", sparsity)
        else:
            _checks.one_of("scope", self.scope, SCOPES)
        _checks.integer("min_weights", self.min_weights, minimum=1)
        _checks.integer("min_per_filter", self.min_per_filter, minimum=0)


@dataclasses.dataclass(frozen=True)
class FineTuning(Training):
    """The stage in which what is left is trained on, the masks fixed.

    Args:
        loss: also "rslad": distillation from the dense network that the first stage has trained.
    """

    epochs: int = 100
    learning_rate: float = 0.01
    decay: str = "cosine"

    @staticmethod
    def _losses() -> tuple[str, ...]:
        return (*LOSSES, "rslad")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How networks are judged: by PGD with restarts, on cross-entropy and on the margin.

    Args:
        epsilon: radius of the ball; None for that of training.
        steps, restarts: of the last evaluation, on the test set.
        validation_steps: of the PGD attack on the validation set, after each epoch; it begins in
            random places and ascends cross-entropy.
        batch_size: examples at a time.
    """

    epsilon: Any = None
    steps: int = 50
    restarts: int = 5
    validation_steps: int = 10
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.epsilon is not None:
            _checks.distance("epsilon", self.epsilon)
        for name in ("steps", "restarts", "validation_steps", "batch_size"):
            _checks.integer(name, getattr(self, name), minimum=1)


def _require_patterns(name: str, value: Any) -> None:
    """Raise a TypeError unless it is None, a name pattern or a list of them."""
    patterns = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(each, str) for each in patterns):
        raise TypeError(f"{name} must be a name pattern or a list of them, got {value!r}.")


def _sequence(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list, got {value!r}.")
    return tuple(value)
