"""Functions that prune a model, freeze its masks, and strip the pruning from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Required, TypedDict, Unpack, overload

import tensorflow as tf

from tscnc_tf import _checks, _keras, gates
from tscnc_tf._keras import masks, wrappers
from tscnc_tf.pruning import tfmot_engine
from tscnc_tf.pruning.learned import Learned
from tscnc_tf.pruning.pruner import Pruner
from tscnc_tf.pruning.regrowth import Regrowth
from tscnc_tf.pruning.score_pruner import ScorePruner
from tscnc_tf.pruning.structures import Structure
from tscnc_tf.pruning.targets import require_unpruned
from tscnc_tf.pruning.taylor import Taylor

ENGINES = ("tfmot", "masks")
METHODS = ("magnitude", "scores")


class _SelectionOptions(TypedDict, total=False):
    """Options of both methods of the masks engine."""

    weights: str | None
    min_rank: int
    structure: Structure | None
    scope: str | Mapping[str, float] | Learned
    min_weights: int


class MaskOptions(_SelectionOptions, total=False):
    """Options of `Pruner`, for type checkers and editors."""

    criterion: Callable[[tf.Tensor], tf.Tensor] | Taylor | None
    regrowth: Regrowth | None


class ScoreOptions(_SelectionOptions, total=False):
    """Options of `ScorePruner`, for type checkers and editors."""

    sparsity: Required[float]
    frequency: int
    also_train: Literal["normalization", "all", "none"]
    perturb_scores: float


class TfmotOptions(TypedDict, total=False):
    """Options of `tfmot.sparsity.keras.prune_low_magnitude`, for type checkers and editors."""

    block_size: tuple[int, int]
    block_pooling_type: Literal["AVG", "MAX"]
    pruning_policy: Any
    sparsity_m_by_n: tuple[int, int] | None


_OPTIONS: dict[str, frozenset[str]] = {
    how: options.__required_keys__ | options.__optional_keys__
    for how, options in (
        ("method='magnitude' by engine='masks'", MaskOptions),
        ("method='magnitude' by engine='tfmot'", TfmotOptions),
        ("method='scores'", ScoreOptions),
    )
}
_BY_MASKS, _BY_TFMOT, _BY_SCORES = _OPTIONS


@overload
def prune(
    model: Any,
    schedule: Any,
    *,
    layers: Any = None,
    engine: Literal["masks"] | None = None,
    method: Literal["magnitude"] = "magnitude",
    **options: Unpack[MaskOptions],
) -> Any: ...
@overload
def prune(
    model: Any,
    schedule: Any,
    *,
    layers: Any = None,
    engine: Literal["tfmot"] | None = None,
    method: Literal["magnitude"] = "magnitude",
    **options: Unpack[TfmotOptions],
) -> Any: ...
@overload
def prune(
    model: Any,
    schedule: None = None,
    *,
    layers: Any = None,
    engine: Literal["masks"] | None = None,
    method: Literal["scores"],
    **options: Unpack[ScoreOptions],
) -> Any: ...
def prune(
    model: Any,
    schedule: Any = None,
    *,
    layers: Any = None,
    engine: str | None = None,
    method: str = "magnitude",
    **options: Any,
) -> Any:
    """Return a model whose weights are pruned during training: by magnitude, or by scores.

    By **magnitude**, the schedule sets the sparsity at each step, and pruned weights stay pruned.
    By **scores** (HYDRA), the model is pruned to `sparsity` at once. Then the scores that choose
    the kept weights are trained, and the weights are not, until `pruning.freeze_mask(model)`. This
    is for a network that is trained already; see `ScorePruner`.

    Two engines prune by magnitude. **"masks"**, the engine for Keras 3, is a `Pruner`: it puts
    masks on the variables of any model of either Keras, in place, and the model is returned.
    **"tfmot"**, the default for tf_keras, wraps the layers by
    `tfmot.sparsity.keras.prune_low_magnitude` and returns a new model that shares the weights. It
    takes Sequential and functional models.

    Weights that can't be pruned are left as they are, and `pruning.report(model)` says why. Train
    the model with `callbacks.pruning_callbacks()`.

    Args:
        model: a built model of either Keras.
        schedule: a `PruningSchedule` of `tscnc_tf.schedules` or tfmot; for the masks engine any
            callable from a step to (whether to renew the masks, the sparsity). None for scores.
        layers: which layers, as in `add_regularizers`; None for all that can be pruned.
        engine: "masks" or "tfmot". None for "tfmot" if a tf_keras model is pruned by magnitude,
            else "masks".
        method: "magnitude" or "scores".
        **options: for the masks engine those of `Pruner`: `weights`, `min_rank`, `criterion`,
            `structure`, `scope`, `min_weights`, `regrowth`. For tfmot `block_size`,
            `block_pooling_type`, `sparsity_m_by_n`, as in tfmot. For scores those of
            `ScorePruner`: `sparsity` (required), `frequency`, `also_train`, `weights`, `min_rank`,
            `structure`, `scope`, `min_weights`, `perturb_scores`.

    Returns:
        The pruned model: the same one, or a new, uncompiled one (tfmot).

    Raises:
        TypeError: `model` is no Keras model, `schedule` no schedule, or an option is unknown.
        ValueError: the model is not built or is pruned already, no weight can be pruned, the engine
            does not take such a model or method, or an option is out of range.
        ImportError: the engine is tfmot, which is not installed.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> model = tscnc.prune(model, tscnc.schedules.CosineSparsity(0.0, 0.5, 10, 100))
        >>> model = tscnc.prune(tscnc.strip(model), method="scores", sparsity=0.75)

    Reference:
        Zhu & Gupta 2017, arXiv 1710.01878; Sehwag et al. 2020, arXiv 2002.10509, for scores.
    """
    library = _keras.library("model", model)
    if _checks.one_of("method", method, METHODS) == "scores":
        return _prune_by_scores(model, schedule, layers, engine, options)
    if schedule is None or "sparsity" in options:
        raise TypeError(
            "schedule must be given with method='magnitude', such as schedules.CosineSparsity(0.0, "
            "0.9, begin_step, end_step); sparsity= is for method='scores', and prune_now(model, "
            f"sparsity) prunes at once. Got schedule={schedule!r}, {options}."
        )
    if engine is None:
        engine = "tfmot" if library is _keras.tf_keras else "masks"
    _checks.one_of("engine", engine, ENGINES)
    _keras.require_built("model", model)
    require_unpruned("model", model)
    if engine == "masks":
        _require_options(options, _BY_MASKS)
        Pruner(model, schedule, layers=layers, **options)
        return model
    if library is _keras.keras:
        raise ValueError(
            f"engine must be 'masks' for the Keras 3 model {model.name!r}: tfmot's wrappers take "
            "tf_keras models only."
        )
    if options.pop("regrowth", None) is not None:
        raise TypeError(
            "regrowth is an option of engine='masks', which prunes tf_keras models, too: tfmot's "
            "wrappers don't give weights back. Pass prune(model, schedule, engine='masks', "
            "regrowth=...)."
        )
    _require_options(options, _BY_TFMOT)
    return tfmot_engine.wrap(model, schedule, layers, options)


def _require_options(options: dict[str, Any], how: str) -> None:
    """Raise a TypeError if this way of pruning does not have one of the options."""
    for name, value in options.items():
        if name in _OPTIONS[how]:
            continue
        others = " and of ".join(other for other, names in _OPTIONS.items() if name in names)
        known = ", ".join(sorted(_OPTIONS[how]))
        way_out = f"it is an option of {others}" if others else f"the options there are {known}"
        raise TypeError(f"{name} must be left out with {how}, got {value!r}: {way_out}.")


def _prune_by_scores(
    model: Any, schedule: Any, layers: Any, engine: str | None, options: dict[str, Any]
) -> Any:
    if schedule is not None:
        raise TypeError(
            f"schedule must be left out with method='scores', got {schedule!r}: the number of "
            "weights that are kept is the same throughout; give it as sparsity=0.99."
        )
    if engine not in (None, "masks"):
        raise ValueError(
            f"engine must be 'masks' (or left out) with method='scores', got {engine!r}."
        )
    if options.pop("regrowth", None) is not None:
        raise TypeError(
            "regrowth must be left out with method='scores': pruned weights can come back anyway, "
            "as each keeps its score."
        )
    _require_options(options, _BY_SCORES)
    if "sparsity" not in options:
        raise TypeError("sparsity must be given with method='scores', such as sparsity=0.99.")
    ScorePruner(model, layers=layers, **options)
    return model


def prune_now(
    model: Any, sparsity: float, *, layers: Any = None, **options: Unpack[MaskOptions]
) -> Any:
    """Prune a model at once, without training. The kept weights do not change, bit for bit.

    The masks are frozen: in further training, zeros stay zeros.

    Args:
        model: a built model of either Keras; it is changed in place.
        sparsity: fraction of zeros, in [0, 1).
        layers: which layers, as in `add_regularizers`; None for all that can be pruned.
        **options: of `Pruner`: `weights`, `min_rank`, `criterion`, `structure`, `scope`,
            `min_weights`.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: as `Pruner`; or `regrowth` is given.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
        >>> model = tscnc.strip(tscnc.prune_now(model, 0.5))
        >>> tscnc.inspection.sparsity(model).sparsity
        0.5
    """
    from tscnc_tf import schedules

    sparsity = _checks.sparsity("sparsity", sparsity)
    if options.get("regrowth") is not None:
        raise TypeError(
            "regrowth must be left out, as prune_now freezes the masks; for training that is sparse"
            " from the start pass prune(model, schedules.OneShot(sparsity), regrowth=...)."
        )
    _require_options(dict(options), _BY_MASKS)
    Pruner(model, schedules.OneShot(sparsity), layers=layers, **options).finalize()
    return model


def freeze_mask(model: Any, *, layers: Any = None) -> Any:
    """Freeze the zeros of a model, for fine-tuning, and return the model.

    The masks of a model that is being pruned do not change any more. If its scores are trained,
    that training ends: from then on the kept weights are trained. Compile the model again for
    fine-tuning. A model without masks, such as a sparse one that was stripped, is given a frozen
    `Pruner` that keeps the non-zero entries of its kernels. Called in a callback of `fit`, it takes
    effect from the next step on.

    Args:
        model: a built model of either Keras; it is changed in place. Strip a model in tfmot's
            wrappers first.
        layers: the layers whose zeros are frozen, as in `add_regularizers`; None for all. Only for
            a model without masks.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: it is not built, is in tfmot's wrappers, or has no weight that can be pruned; or
            `layers` is given for a model that has masks.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
        >>> model = tscnc.prune(model, tscnc.schedules.CosineSparsity(0.0, 0.5, 10, 100))
        >>> tscnc.pruning.freeze_mask(model).pruner.frozen
        True
    """
    _keras.library("model", model)
    if wrappers.wrapped_layers(model):
        raise ValueError(
            f"model {model.name!r} is in tfmot's wrappers, whose schedule can't be stopped: strip "
            "it first, then freeze its mask."
        )
    pruners = masks.pruners(model)
    if pruners and layers is not None:
        raise ValueError(
            f"layers must be None for model {model.name!r}, which has masks already, "
            f"got {layers!r}."
        )
    for pruner in pruners:
        pruner.freeze()
    if not pruners:
        Pruner.of_zeros(model, layers)
    return model


def strip(model: Any) -> Any:
    """Return a model without pruner, tfmot's wrappers and gates, the masks applied to the weights.

    * A `Pruner` is removed in place, and the same model is returned. Weights that other models
      share are no longer masked there either. Called in a callback of `fit`, it takes effect from
      the next step on.
    * For a model in tfmot's wrappers, a new model without them is returned, which shares the
      weights.
    * For a model with gates, a new model with its own weights is returned, which the gates are
      multiplied into (`gates.fold`). The given model is not changed, except that its masks are
      applied.

    Any other model is returned as it is.

    Args:
        model: a model of either Keras; Sequential or functional if it has tfmot's wrappers or
            gates.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: `model` is subclassed and holds wrappers or gates.

    Example:
        >>> import keras
        >>> import tscnc_tf as tscnc
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
        >>> plain_class = type(model)
        >>> pruned = tscnc.prune(model, tscnc.schedules.OneShot(0.5))
        >>> type(tscnc.strip(pruned)) is plain_class
        True
    """
    _keras.library("model", model)
    for pruner in masks.pruners(model):
        pruner.apply(getattr(pruner.model, "optimizer", None))
        pruner.detach()
    return gates.fold(tfmot_engine.unwrap(model) if wrappers.wrapped_layers(model) else model)


def prune_scope() -> Any:
    """Return tfmot's scope, in which models in its wrappers can be loaded, from any format.

    Models with a `Pruner` don't need it: to load them, import tscnc_tf.

    Raises:
        ImportError: tensorflow-model-optimization is not installed.

    Example:
        >>> import tf_keras
        >>> import tscnc_tf as tscnc
        >>> with tscnc.pruning.prune_scope():  # doctest: +SKIP
        ...     model = tf_keras.models.load_model("pruned.keras")
    """
    return _keras.tfmot().sparsity.keras.prune_scope()
