"""Regrowth: the smallest kept weights are exchanged for others, every so many steps."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _configs, _keras
from tscnc_tf._keras import optimizers
from tscnc_tf._keras.flavours import tensor_variable
from tscnc_tf.functional import scheduling
from tscnc_tf.pruning.selection import Magnitude, finite
from tscnc_tf.pruning.structures import Exchange, Move, Structure, Unstructured
from tscnc_tf.pruning.targets import Target

__all__ = ["Regrowth"]

# The names of an accuracy in logs; the first one that is there is used.
_ACCURACIES = ("adversarial_accuracy", "accuracy", "acc", "sparse_categorical_accuracy")


@_keras.register
@dataclasses.dataclass(frozen=True)
class Regrowth(_configs.Configurable):
    r"""Exchanges kept weights of a sparse network for pruned ones during training.

    Every `frequency` steps, in every weight tensor, the fraction

    .. math:: f(t) = \tfrac12\,\text{fraction}\,(1 + \cos(\pi t / T)), \quad
        T = \text{until} \cdot \text{steps}

    of the kept weights, rounded to a number, is dropped: those of the smallest magnitude. The same
    number of weights grows, so that the masks keep exactly as many weights as the schedule says:
    those with the largest gradient magnitude among all pruned and dropped weights. A grown weight
    starts from 0, and so do its slots in the optimizer (momenta, second moments, averages). From
    step T on, the masks do not change. Until then, weights that have just grown are zero in a
    stripped or exported model, too. With structures other than `Unstructured`, whole units are
    exchanged, by the means of their weights. With `NM`, the number of kept weights of every group
    does not change.

    The **gradient** is the one that the optimizer applies in the same step: that of the training
    loss with all penalties (the robust loss under `AdversarialTraining`). It includes pruned
    weights, which are zeros in the layer, so it costs nothing. A step whose gradients are not
    finite exchanges no weights. With gradient accumulation, and under a distribution strategy, the
    sum over batches or replicas counts.

    **The sparsity may follow the validation** (Flying Bird+) in a network that is sparse from the
    start. The first exchange after an epoch changes the number k of kept weights of a tensor by

    .. math:: f k\,(g \cdot \text{extra\_growth} - o \cdot \text{extra\_drop}),

    each term rounded. The network overfits (o = 1) if in half or more of the last `window` epochs
    the accuracy in training rose more, or fell less, than that in validation. It stagnates (g = 1)
    if in half or more of them the validation loss did not fall. Otherwise, and until `window` + 1
    epochs have ended, o and g are 0. This needs `callbacks.pruning_callbacks()` and
    `validation_data` in `fit`. The epochs are saved with the model.

    If the schedule has its final sparsity at step 1, as `OneShot(sparsity)` has, the pruner prunes
    in its constructor: the network is sparse from the start. (The largest of random weights are at
    random positions.) With a rising schedule, a dense network is pruned, and regrows during that.
    The pruner raises a ValueError if it is known that no weight would ever be exchanged, because T
    is before the first multiple of `frequency`, or before the first pruned weight.

    Args:
        fraction: of the kept weights that are dropped at first, in (0, 1).
        criterion: which weights grow: "gradient", or "random".
        until: the share of `steps` after which the masks do not change, in (0, 1].
        frequency: number of optimizer steps between exchanges, >= 1.
        steps: number of optimizer steps of the training, counted as the pruner counts them; None
            for the `end_step` of the schedule.
        across_layers: whether weights are exchanged between tensors, so that the sparsity of each
            tensor changes, but not that of all together; each keeps its `min_weights`. For
            `Unstructured` only, with scope "global" or "lamp".
        seed: of the random choices, >= 0.
        extra_drop: by what share more weights are dropped, and not replaced, if the network
            overfits, in [0, 1]; 0.4 in the paper's code. For `Unstructured` only.
        extra_growth: by what share more weights grow if the network stagnates, in [0, 1]; 0.05 in
            the paper's code. For `Unstructured` only.
        window: number of epochs that are compared, >= 1.
        sparsity_range: the smallest and the largest sparsity that these two may lead to: of all
            weights that are trained, up to the rounding in each tensor.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
        >>> regrowth = tscnc.pruning.Regrowth(frequency=10, steps=1000)
        >>> schedule = tscnc.schedules.OneShot(0.75)
        >>> model = tscnc.prune(model, schedule, engine="masks", regrowth=regrowth)
        >>> tscnc.inspection.sparsity(model).sparsity
        0.75

    Reference:
        Evci et al. 2020, "Rigging the lottery", arXiv 1911.11134, algorithm 1 (there the optimizer
        pauses in a step that moves weights; here it does not); Chen et al. 2022, "Sparsity winning
        twice", arXiv 2202.09844, for adversarial training (Flying Bird and Flying Bird+; in their
        code the sparsity moves in the second half of the training only); Mocanu et al. 2018, arXiv
        1707.04780, for random growth.
    """

    fraction: float = 0.3
    criterion: str = "gradient"
    until: float = 0.75
    frequency: int = 100
    steps: int | None = None
    across_layers: bool = False
    seed: int = 0
    extra_drop: float = 0.0
    extra_growth: float = 0.0
    window: int = 4
    sparsity_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        _checks.number("fraction", self.fraction, above=0.0, below=1.0)
        _checks.one_of("criterion", self.criterion, ("gradient", "random"))
        _checks.number("until", self.until, above=0.0, maximum=1.0)
        _checks.integer("frequency", self.frequency, minimum=1)
        if self.steps is not None:
            _checks.integer("steps", self.steps, minimum=2)
        _checks.boolean("across_layers", self.across_layers)
        _checks.seed("seed", self.seed)
        _checks.number("extra_drop", self.extra_drop, minimum=0.0, maximum=1.0)
        _checks.number("extra_growth", self.extra_growth, minimum=0.0, maximum=1.0)
        _checks.integer("window", self.window, minimum=1)
        limits = _checks.bounds("sparsity_range", self.sparsity_range)
        if limits[0] < 0.0 or limits[1] > 1.0:
            raise ValueError(f"sparsity_range must lie in [0, 1], got {self.sparsity_range!r}.")
        object.__setattr__(self, "sparsity_range", limits)

    @property
    def needs_gradients(self) -> bool:
        """Whether it needs the gradients of a step."""
        return self.criterion == "gradient"

    @property
    def epochs(self) -> int:
        """The number of epochs whose results it needs, 0 if the sparsity is the schedule's."""
        return self.window + 1 if self.extra_drop or self.extra_growth else 0

    def require(
        self, structure: Structure, scope: Any, targets: Sequence[Target], schedule: Any
    ) -> None:
        """Raise a ValueError if it does not fit the arguments of a pruner."""
        if self.across_layers and not isinstance(structure, Unstructured):
            raise ValueError(
                f"across_layers must be False with structure={structure!r}, whose units are of "
                "different sizes in different layers."
            )
        if self.across_layers and scope not in ("global", "lamp"):
            raise ValueError(
                f"across_layers must be False with scope={scope!r}, which gives each layer its "
                "own number of weights. Take scope='global' or scope='lamp'."
            )
        if self.epochs and not isinstance(structure, Unstructured):
            raise ValueError(
                f"extra_drop and extra_growth must be 0 with structure={structure!r}: only the "
                "number of single weights may follow the validation."
            )
        final = scheduling.final_sparsity(schedule)
        if self.epochs and not scheduling.is_at_once(schedule):
            raise ValueError(
                f"extra_drop and extra_growth must be 0 with {schedule!r}, which sets the sparsity "
                "again and again: take schedules.OneShot(sparsity)."
            )
        if self.epochs and not self.sparsity_range[0] <= final <= self.sparsity_range[1]:
            raise ValueError(
                f"sparsity_range must contain the sparsity of the schedule, {final:g}, got "
                f"{self.sparsity_range!r}."
            )
        structure.require_equal_units(targets)
        if self.last_step(schedule) < 1:
            raise ValueError(
                f"steps must be given to Regrowth, the number of optimizer steps of the training: "
                f"{schedule!r} does not say how long it is."
            )

    def require_optimizer(self, optimizer: Any) -> None:
        """Raise a ValueError for an optimizer that can't train weights that come back."""
        if type(optimizers.innermost(optimizer)).__name__ == "Ftrl":
            raise ValueError(
                "optimizer must not be Ftrl for a model with regrowth: a weight that comes back "
                "would be NaN, as the optimizer divides by its accumulated gradients. Use SGD or "
                "Adam."
            )

    def require_moves(self, schedule: Any) -> None:
        """Raise a ValueError if it is known that a schedule never lets a weight move."""
        if self.first_move(schedule) == 0:
            raise ValueError(
                f"regrowth={self!r} would never move a weight under {schedule!r}: it does so at "
                f"multiples of frequency={self.frequency} below step {self.last_step(schedule)} "
                "(until * steps), once weights are pruned. Take a smaller frequency, a schedule "
                "that prunes earlier, or the number of optimizer steps of the whole training for "
                "steps."
            )

    def first_move(self, schedule: Any) -> int | None:
        """Return the first step at which weights move; 0 if there is none, None if not known.

        It is the first multiple of `frequency` with pruned weights, if that is below T.
        """
        last = self.last_step(schedule) - 1
        known = scheduling.renewals(schedule, last) if self.frequency <= last else []
        if known is None:
            return None
        begin = next((step for step, sparsity in known if sparsity > 0), last + 1)
        step = -(-begin // self.frequency) * self.frequency
        return step if step <= last else 0

    def last_step(self, schedule: Any) -> int:
        """Return the step T, from which no weight moves; 0 if it is not known."""
        steps = getattr(schedule, "end_step", -1) if self.steps is None else self.steps
        return round(self.until * steps) if steps > 1 else 0

    def is_due(self, schedule: Any, before: tf.Tensor, now: tf.Tensor) -> tf.Tensor:
        """Return whether weights move at a step in (before, now]."""
        has_multiple = now // self.frequency > before // self.frequency
        return has_multiple & (now < self.last_step(schedule))

    def share(self, schedule: Any, step: tf.Tensor) -> tf.Tensor:
        """Return the fraction of the kept weights that are dropped at a step."""
        progress = tf.cast(step, tf.float32) / self.last_step(schedule)
        return 0.5 * self.fraction * (1.0 + tf.cos(math.pi * tf.minimum(progress, 1.0)))

    def epoch(self, logs: Mapping[str, Any]) -> np.ndarray | None:
        """Return what it needs of an epoch, `(1, 2)`, see `changes`; None without a validation.

        Args:
            logs: of an epoch of `fit`.

        Raises:
            ValueError: there is a validation, but no accuracy.
        """
        names = [name for name in _ACCURACIES if {name, f"val_{name}"} <= set(logs)]
        if "val_loss" not in logs:
            return None
        if not names:
            raise ValueError(
                f"{self!r} follows the validation, but the logs of the epoch have none of "
                f"{_ACCURACIES}: compile the model with metrics=['accuracy']. They are "
                f"{sorted(logs)}."
            )
        gap = float(logs[names[0]]) - float(logs[f"val_{names[0]}"])
        return np.array([[gap, float(logs["val_loss"])]], np.float32)

    @staticmethod
    def used(history: tf.Tensor) -> tf.Tensor:
        """Return `history` after an exchange: it says nothing until the next epoch is recorded."""
        return tf.concat([tf.fill((1, 2), np.nan), history[1:]], axis=0)

    def warn_of_no_validation(self, schedule: Any, steps: int) -> None:
        """Warn that a training up to step `steps` has recorded no epoch, if it needs any."""
        if self.epochs and steps < self.last_step(schedule):
            warnings.warn(
                f"{self!r} follows the validation, but this training has recorded none: pass "
                "validation_data and callbacks.pruning_callbacks() to fit.",
                UserWarning,
                stacklevel=4,
            )

    def changes(
        self, history: tf.Tensor, kept: Sequence[Any], share: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Return by what shares more weights are dropped, and more weights grow.

        Args:
            history: of the last `epochs` epochs, the accuracy in training minus that in validation,
                and the validation loss, `(epochs, 2)`; NaN for epochs that have not ended.
            kept: all masks.
            share: fraction of the kept weights that are dropped and replaced.
        """
        rises = history[1:] - history[:-1]
        overfits = tf.reduce_mean(tf.cast(rises[:, 0] > 0, tf.float32)) >= 0.5
        stagnates = tf.reduce_mean(tf.cast(rises[:, 1] >= 0, tf.float32)) >= 0.5
        is_known = tf.reduce_all(tf.math.is_finite(history))
        size = float(sum(mask.shape.num_elements() for mask in kept))
        count = tf.add_n([tf.math.count_nonzero(mask, dtype=tf.int32) for mask in kept])
        count = tf.cast(count, tf.float32)
        replaced = tf.maximum(share * count, 1.0)
        most_dropped = tf.maximum(count - (1.0 - self.sparsity_range[1]) * size, 0.0) / replaced
        most_grown = tf.maximum((1.0 - self.sparsity_range[0]) * size - count, 0.0) / replaced
        return (
            tf.where(is_known & overfits, tf.minimum(self.extra_drop, most_dropped), 0.0),
            tf.where(is_known & stagnates, tf.minimum(self.extra_growth, most_grown), 0.0),
        )

    def masks(
        self,
        structure: Structure,
        pairs: Sequence[tuple[Target, Any]],
        gradients: Sequence[Any],
        *,
        share: tf.Tensor,
        history: Any,
        step: tf.Tensor,
        min_weights: int,
    ) -> list[tf.Tensor]:
        """Return the masks after a move.

        Args:
            structure: the structure of the pruner.
            pairs: (target, mask) of each weight tensor.
            gradients: of the loss with respect to each; not used with criterion "random".
            share: fraction of the kept weights that are dropped.
            history: see `changes`, a variable; None if the number of kept weights is fixed.
            step: the present step, for the seeds.
            min_weights: the minimum number of kept weights of every weight tensor.
        """
        weights = [tf.convert_to_tensor(tensor_variable(target.variable)) for target, _ in pairs]
        magnitudes = [finite(Magnitude()(weight)) for weight in weights]
        widest = tf.float64 if any(m.dtype == tf.float64 for m in magnitudes) else tf.float32
        moves = []
        for index, (target, mask) in enumerate(pairs):
            keep_score = tf.cast(magnitudes[index], widest)
            if self.needs_gradients:
                grow_score = tf.cast(tf.abs(gradients[index]), widest)
            else:
                seed = tf.stack([tf.constant(self.seed, tf.int32), tf.cast(step, tf.int32)])
                seed = tf.random.experimental.stateless_fold_in(seed, index)
                grow_score = tf.random.stateless_uniform(target.shape, seed, dtype=widest)
            moves.append(Move(target, tf.convert_to_tensor(mask), keep_score, grow_score))
        exchange = Exchange(share)
        if self.across_layers or self.epochs:
            exchange = Exchange(share, min_weights, self.across_layers)
        if history is not None:
            epochs = tf.convert_to_tensor(tensor_variable(history))
            drop, growth = self.changes(epochs, [move.mask for move in moves], share)
            exchange = exchange._replace(extra_drop=drop, extra_growth=growth)
        return structure.moved(moves, exchange)
