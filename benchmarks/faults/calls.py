"""Random calls of public functions, classes and methods with one wrong argument."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import pathlib
import re
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import hypothesis
import keras
import numpy as np
import tensorflow as tf
from hypothesis import strategies

import tscnc_tf as tscnc
from benchmarks.faults.outcome import Outcome
from tscnc_tf import _checks, _reports

CALLS, FEW = 3000, 40
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**70, 0.5, -0.5, 1.5, float("nan"), float("inf"), 1e-300, 1j),
    *("", "x", "8/0", "../x", "linf", b"bytes", pathlib.Path("nowhere/nothing"), "\0", "x" * 5000),
    *((), [], {}, (1, 2, 3), [None], {"x": 1}, {1: 2}, ("x", 3), (1.0, 0.0), {0.5}, range(3)),
    *(object(), np, Ellipsis, NotImplemented, slice(1)),
    *(np.zeros(0), np.zeros((2, 3)), np.full((4, 6), np.nan), np.array("x"), np.array([None])),
    *(np.zeros((1, 1, 1, 1, 1), np.float16), np.arange(5), np.int8(-3), np.float32(0.1)),
    *(tf.constant("x"), tf.ragged.constant([[1.0], [2.0, 3.0]]), tf.zeros((2, 0)), tf.float16),
    *(keras.optimizers.SGD(), keras.metrics.Mean),
)
"""Values that are wrong for most arguments; where one is valid, the call may succeed."""

BESIDE: dict[str, Mapping[str, Any]] = {
    "evaluate_robustness": {"epsilon": 0.1, "y": np.arange(8) % 3},
    "prune": {"schedule": tscnc.schedules.OneShot(0.5)},
    "pruning.prune": {"schedule": tscnc.schedules.OneShot(0.5)},
    "inspection.operator_singular_values": {"kernel": np.ones((3, 2, 2))},
    "attacks.CleverHans": {"attack": "fast_gradient_method"},
    "functional.random_start": {"shape": (8, 6)},
    "evaluation.evaluate_robustness": {"epsilon": 0.1, "y": np.arange(8) % 3},
    "evaluation.robustness_curve": {"attack": lambda e: tscnc.attacks.FGSM(epsilon=e)},
    "export.rewrite_litert": {"source": "nowhere.tflite"},
    **dict.fromkeys(
        (f"attacks.{kind}.__call__" for kind in tscnc.attacks.__all__),
        types.MappingProxyType({"y": np.arange(8) % 3}),
    ),
    **dict.fromkeys(
        ("AdversarialTraining", "training.AdversarialTraining"),
        types.MappingProxyType(
            {"attack": tscnc.attacks.FGSM(epsilon=0.1), "loss": tscnc.losses.Madry()}
        ),
    ),
    **dict.fromkeys(
        ("AdversarialTraining.fit", "training.AdversarialTraining.fit"),
        types.MappingProxyType(
            {"x": np.full((8, 6), 0.5, "float32"), "y": np.arange(8) % 3, "verbose": 0}
        ),
    ),
}
"""By function, arguments that it needs in addition to, or instead of, those of `_arguments`."""

# Methods that Keras or other parts of the package call, with arguments that these have checked; and
# those that pass their arguments on to a method of Keras.
_NOT_FOR_USERS = set(
    """
    bind build call changes check_labels compile compile_from_config compute_output_shape constrain
    epoch first_move from_config importance in_turn is_behind is_due last_step load_weights
    make_test_function make_train_function masks moved of_masks perturb perturbed reachable reason
    reference removes_outputs require require_classes require_equal_units require_moves
    require_optimizer save set_model set_weights share skip_steps step_function test_step train_step
    update_step used warn_of_no_validation with_defaults
    """.split()  # noqa: SIM905
)
_RETURNED = (
    _reports.Report,
    tscnc.datasets.StoredImages,
    tscnc.evaluation.AttackResult,
    tscnc.export.ServedFile,
    tscnc.export.ServedModel,
)

_TINY = {
    "data": {"dataset": "digits", "train_examples": 64, "test_examples": 16},
    "network": {"architecture": "small-cnn", "options": {"width": 2}},
    **{stage: {"epochs": 1, "batch_size": 32} for stage in ("train", "prune", "finetune")},
    "adversary": {"steps": 1},
    "evaluate": {"attack": "pgd", "steps": 1, "restarts": 1, "validation_steps": 1},
}


def scenarios(smoke: bool) -> Iterator[Outcome]:
    """Call functions, classes and methods with one wrong argument; yield the outcome."""
    outcome = Outcome("public functions, classes and methods called with one wrong argument")
    arguments = _arguments()
    named = dict(public_callables())
    named |= dict(public_methods(named))
    calls = strategies.tuples(
        strategies.sampled_from(sorted(named)),
        strategies.integers(0, 2**16),
        strategies.sampled_from(WRONG),
    )

    @hypothesis.settings(
        max_examples=FEW if smoke else CALLS,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(calls)
    def attempt(drawn: tuple[str, int, Any]) -> None:
        name, place, value = drawn
        function = named[name]
        if isinstance(function, Method):
            function = function.bind(arguments)
        call(outcome, name, function, place, value, arguments)

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        attempt()
    yield outcome


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield names and objects of the functions and classes that users call."""
    for name in tscnc.__all__:
        value = getattr(tscnc, name)
        pairs = [(name, value)]
        if inspect.ismodule(value):
            pairs = [(f"{name}.{inner}", getattr(value, inner)) for inner in value.__all__]
        for full, each in pairs:
            is_kind = isinstance(each, type)
            if not callable(each) or (is_kind and issubclass(each, Warning | _reports.Record)):
                continue  # functions return records and reports
            if is_kind and (inspect.isabstract(each) or issubclass(each, _RETURNED)):
                continue
            yield full, each


class Method(NamedTuple):
    """A method of a public class.

    Attributes:
        kind: the class.
        kind_name: its name in the package.
        name: of the method.
    """

    kind: type
    kind_name: str
    name: str

    def __call__(self) -> None:
        """Do nothing: a method is called by what `bind` returns."""

    def bind(self, arguments: dict[str, Callable[[], Any]]) -> Callable[..., Any]:
        """Return the method of the class, if it is one, or else of a new object."""
        if isinstance(inspect.getattr_static(self.kind, self.name), classmethod | staticmethod):
            return getattr(self.kind, self.name)
        made = self.kind(**_needed(self.kind_name, self.kind, arguments))
        if isinstance(made, tscnc.AdversarialTraining):
            made.compile("sgd")
        return getattr(made, self.name)


def public_methods(callables: Mapping[str, Any]) -> Iterator[tuple[str, Method]]:
    """Yield names and methods that users call with arguments, of classes by their names."""
    for kind_name, kind in callables.items():
        for name in dir(kind) if isinstance(kind, type) else ():
            method = getattr(kind, name)
            is_public = name == "__call__" or not name.startswith(("_", "on_"))
            if not is_public or name in _NOT_FOR_USERS or not inspect.isroutine(method):
                continue
            if not str(method.__module__).startswith("tscnc_tf"):
                continue  # of Keras
            parameters = inspect.signature(method).parameters
            if set(parameters) - {"self", "args", "kwargs"}:
                yield f"{kind_name}.{name}", Method(kind, kind_name, name)


def call(
    outcome: Outcome,
    name: str,
    function: Callable[..., Any],
    place: int,
    value: Any,
    arguments: dict[str, Callable[[], Any]],
) -> None:
    """Call a function with `value` as its argument number `place`; add the result to `outcome`."""
    parameters = _parameters(function)
    if not parameters:
        outcome.count("has no arguments")
        return
    wrong = parameters[place % len(parameters)].name
    given = _needed(name, function, arguments, besides=wrong) | {wrong: value}
    before = written()
    shown = repr(value) if len(repr(value)) < 60 else f"a {type(value).__name__}"
    case = f"{name}({wrong}={shown})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**given)
    except Exception as error:
        if not is_clear(name, function, {wrong: value}, error):
            outcome.lose(f"{case}: {type(error).__name__}: {str(error)[:200]}")
        elif written() != before:
            outcome.lose(f"{case}: refused, but has written {written() - before}")
        else:
            outcome.count("refused, clearly")
        return
    outcome.count("taken as it is")
    for path in written() - before:
        pathlib.Path(path).unlink(missing_ok=True)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of a function that have a name."""
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _needed(
    name: str,
    function: Callable[..., Any],
    arguments: dict[str, Callable[[], Any]],
    besides: str = "",
) -> dict[str, Any]:
    """Return valid values of the arguments that a function needs besides one."""
    needed = [p.name for p in _parameters(function) if p.default is p.empty and p.name != besides]
    known = BESIDE.get(name, {})
    return {each: arguments[each]() for each in needed if each not in known} | dict(known)


def is_clear(
    name: str, function: Callable[..., Any], wrong: dict[str, Any], error: Exception
) -> bool:
    """Tell whether an error says what is wrong.

    It does if it is a TypeError or a ValueError with the name of the argument, or the path or a key
    if that is the argument; an OSError with a path; or an error that the docstring lists. Functions
    of tensors may also raise errors of TensorFlow.
    """
    of_tensors = re.match(
        r"functional\.|losses\.|(pruning|regularizers|schedules)\.\w+\.__call__", name
    )
    if of_tensors and isinstance(error, (TypeError, ValueError, tf.errors.OpError)):
        return True
    if type(error) in (TypeError, ValueError, _checks.DtypeError):
        ((argument, value),) = wrong.items()
        named = [value] if isinstance(value, str | pathlib.Path) else []
        named += list(value) if isinstance(value, dict) else []
        # Short texts, such as "x", are in every message, so they count in quotation marks only.
        texts = [str(each) if len(str(each)) > 3 else repr(each) for each in named]
        return (
            any(text in str(error) for text in texts)
            or re.search(rf"\b{argument.removesuffix('s')}s?\b", str(error)) is not None
        )
    if isinstance(error, OSError) and error.filename:
        return True
    _, _, raises = (inspect.getdoc(function) or "").partition("Raises:\n")
    named = set(re.findall(r"\b[A-Z]\w*Error\b", raises.partition("\n\n")[0]))
    return isinstance(error, tuple(getattr(builtins, each, ()) for each in named))


def written() -> set[str]:
    """Return the paths of the files in the working folder."""
    return {str(path) for path in pathlib.Path().rglob("*") if path.is_file()}


def _arguments() -> dict[str, Callable[[], Any]]:
    """Return functions that make valid values of the arguments without defaults, by name."""
    rng = np.random.default_rng(0)
    x, y = rng.random((8, 6)).astype("float32"), np.arange(8) % 3
    logits = rng.normal(size=(8, 3)).astype("float32")
    kernel = rng.normal(size=(6, 4)).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu", name="inner"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(3),
        ]
    )
    images = rng.random((8, 4, 4, 1)).astype("float32")
    tiny = tscnc.experiments.Recipe.from_dict(_TINY)
    values: dict[str, Any] = {
        **{"x": x, "y": y, "labels": y, "logits": logits, "reference_logits": logits},
        **{"targets": (y + 1) % 3, "num_classes": 3, "kernel": kernel, "matrix": kernel},
        **{"scores": kernel, "gradient": x, "delta": x, "values": kernel, "log_alpha": kernel},
        **{"uniform": np.full_like(kernel, 0.5), "epsilon": 0.1, "norm": "linf", "seed": (0, 1)},
        **{"shape": (6, 4), "dtype": tf.float32, "groups": "filter", "size": 24, "count": 6},
        **{"sizes": (6, 4), "share": 0.5, "budget": 6.0, "kept": kernel > 0.0, "sparsity": 0.5},
        **{"input_size": 8, "factor": 0.1, "sparsity_factor": 0.1, "condition_factor": 0.1},
        **{"initial_sparsity": 0.0, "final_sparsity": 0.5, "begin_step": 0, "end_step": 10},
        **{"max_condition_number": 9.0, "rows": 4, "columns": 1, "n": 2, "m": 4},
        **{"step": 1, "split": "train", "batch_size": 4, "steps_per_epoch": 2},
        **{"begin_epoch": 0, "end_epoch": 2, "precision": "float32", "layout": "standard"},
        **{"condition_number": 2.0, "weight": kernel},
        **{"channel_groups": 1, "optimizer": keras.optimizers.SGD(), "gradients_and_variables": []},
        **{"clean_logits": logits, "adversarial_logits": logits, "epoch": tf.data.Dataset.range},
        **{"depth": 16, "width": 1, "text": "1", "where": "seed", "manifest": {}, "metrics": ()},
        **{"x_train": images, "y_train": y, "x_validation": images, "y_validation": y},
        **{"successes": 3, "trials": 8, "epsilons": (0.1, 0.2), "evaluations": {}},
        **{"x_test": images, "y_test": y, "class_names": ("a", "b", "c"), "name": "own"},
        **{"augmentation": "none", "name_or_path": "digits", "folder": "nowhere"},
        **{"attack": tscnc.attacks.FGSM(epsilon=0.1), "function": lambda *given: given[1]},
        **{"regularizer": tscnc.regularizers.TransformedL1(0.1), "regularizers": ["l2"]},
        **{"schedule": tscnc.schedules.OneShot(0.5), "layer": keras.layers.Dense(2)},
        **{
            "loss": tscnc.losses.Madry(),
            "recipe": tiny,
            "recipes": {"tiny": tiny},
            "plan": tscnc.experiments.Sweep({"tiny": tiny}),
        },
    }
    return {
        **{name: lambda value=value: value for name, value in values.items()},
        # Copies, since pruning may change a model.
        **dict.fromkeys(("model", "teacher", "source"), lambda: keras.models.clone_model(model)),
        "path": lambda: pathlib.Path(tempfile.mkdtemp(dir=".")) / "model",
    }
