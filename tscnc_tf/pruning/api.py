"""The functions that prune a model, keep its zeros, and remove the pruning from it."""

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
    """Return a model whose weights are pruned as it is trained: by magnitude, or by scores.

    By **magnitude** the schedule says when how much is pruned, and what is pruned stays so. By
    **scores** (HYDRA) the model is pruned to `sparsity` at once, and training finds out which
    weights to keep: their scores are trained and the weights are not, until
    `pruning.freeze_mask(model)`. That is for a network that has been trained already; see
    `ScorePruner`.

    Two engines do the first. **"masks"**, the one for Keras 3, is a `Pruner`: masks on the
    variables of any model of either Keras, which is changed in place and returned. **"tfmot"**, the
    default for tf_keras, puts each layer into a wrapper of
    `tfmot.sparsity.keras.prune_low_magnitude` and returns a new model that shares the weights; it
    takes Sequential and functional models.

    Weights that can't be pruned don't abort it: they are left as they are, and
    `pruning.report(model)` says why. Train the model with `callbacks.pruning_callbacks()`.

    Args:
        model: a built model of either Keras.
        schedule: a `PruningSchedule` of `tscnc_tf.schedules` or tfmot; for the masks engine any
            callable from a step to (whether to choose the weights anew, the sparsity). None for
            scores.
        layers: which layers, as in `add_regularizers`; None for all that can be pruned.
        engine: "masks" or "tfmot"; None for tfmot where the model is a tf_keras model, but for
            scores, which the masks engine trains.
        method: "magnitude" or "scores".
        **options: for the masks engine those of `Pruner`: `weights`, `min_rank`, `criterion`,
            `structure`, `scope`, `min_weights`, `regrowth`. For tfmot `block_size`,
            `block_pooling_type`, `sparsity_m_by_n`, as tfmot takes them. For scores those of
            `ScorePruner`: `sparsity`, which has to be given, `frequency`, `also_train`, `weights`,
            `min_rank`, `structure`, `scope`, `min_weights`, `perturb_scores`.

    Returns:
        The pruned model: the same one, or a new, uncompiled one (tfmot).

    Raises:
        TypeError: `model` is no Keras model, `schedule` no schedule, or an option is not known.
        ValueError: the model is not built or pruned already, nothing can be pruned, the engine does
            not take such a model or method, or an option is out of range.
        ImportError: the engine is tfmot, and it is not installed.

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
    """Raise a TypeError that names an option which this way of pruning does not have."""
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
            "regrowth must be left out with method='scores', by which weights come back anyway: "
            "each keeps its score."
        )
    _require_options(options, _BY_SCORES)
    if "sparsity" not in options:
        raise TypeError("sparsity must be given with method='scores', such as sparsity=0.99.")
    ScorePruner(model, layers=layers, **options)
    return model


def prune_now(
    model: Any, sparsity: float, *, layers: Any = None, **options: Unpack[MaskOptions]
) -> Any:
    """Prune a model at once, without training; what is kept stays as it is, bit for bit.

    The model keeps its masks, frozen: if it is trained on, what is zero stays zero.

    Args:
        model: a built model of either Keras; it is changed in place.
        sparsity: fraction of zeros, in [0, 1).
        layers: which layers, as in `add_regularizers`; None for all that can be pruned.
        **options: of `Pruner`: `weights`, `min_rank`, `criterion`, `structure`, `scope`,
            `min_weights`.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: as `Pruner`; or `regrowth` is given, though nothing is trained.

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
    """Keep a model's zeros where they are from now on, for fine-tuning; return the model.

    A model that is being pruned keeps its masks as they are. For one whose scores are trained that
    ends the stage: its weights are trained again, those that are kept; compile the model anew for
    that, as fine-tuning has a learning rate of its own. A model that has no masks, such as a sparse
    one that was stripped, is given a frozen `Pruner`, whose masks are where its kernels are not
    zero. In a callback of `fit` it acts from the next step on.

    Args:
        model: a built model of either Keras; it is changed in place. One in tfmot's wrappers is to
            be stripped first.
        layers: the zeros of which layers, as in `add_regularizers`; None for all. For a model that
            has no masks yet.

    Raises:
        TypeError: `model` is no Keras model.
        ValueError: it is not built, in tfmot's wrappers, or has nothing that could be pruned; or
            layers are given for a model that has masks.

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
    """Return a pruned model without what pruned it, its masks applied to the weights.

    A model with a `Pruner` loses it in place, and is itself returned, in a callback of `fit` from
    the next step on; what other models share with it is free, too. A model in tfmot's wrappers
    stays, and a new one without them is returned, which shares its weights. A model with gates
    stays as well, but for its masks, and a new one is returned that has weights of its own, with
    the gates in them (`gates.fold`). A model that has nothing of these is returned as it is.

    Args:
        model: a model of either Keras; with tfmot's wrappers or gates a Sequential or functional
            one.

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
    """Return tfmot's scope, in which models in its wrappers load, from whatever format.

    Models with a `Pruner` need none: they load wherever tscnc_tf has been imported.

    Raises:
        ImportError: tensorflow-model-optimization is not installed.

    Example:
        >>> import tf_keras
        >>> import tscnc_tf as tscnc
        >>> with tscnc.pruning.prune_scope():  # doctest: +SKIP
        ...     model = tf_keras.models.load_model("pruned.keras")
    """
    return _keras.tfmot().sparsity.keras.prune_scope()
