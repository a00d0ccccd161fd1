"""Recipes: all that decides how an experiment comes out, as one value that is checked at once."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Self, get_type_hints

from tscnc_tf import _checks, _extras
from tscnc_tf.experiments.parts import (
    Adversary,
    Constraints,
    Data,
    Evaluation,
    FineTuning,
    Gates,
    Network,
    Pruning,
    Training,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    r"""All that decides how an experiment comes out: the data, the network, the three stages.

    The defaults are the figures of the TSCNC paper's authors, where they are known: :math:`\epsilon
    = 8/255`, PGD-10 with steps of 0.0069, SGD at 0.1 with Nesterov momentum 0.9, batches of 128,
    200 epochs with the learning rate times 0.2 after 30, 60 and 80 % of them (60, 120 and 160),
    weight averages of 0.99; then 20 epochs of pruning by scores, as in HYDRA, and fine-tuning at
    0.01. Where they are not known (factors of the constraints, weight decay, the length of the
    fine-tuning) the defaults are this package's own.

    Args:
        name: what this setting is called; it may name a folder, so / and \ are no part of it.
        seed: of everything that is drawn: splits, first weights, batches, augmentation, attacks.
        sparsity: fraction of zeros among the weights that are pruned, in [0, 1).
        data, network, adversary, constraints, gates: what all stages share.
        train, prune, finetune: the three stages.
        evaluate: the last word, on the test set.

    Raises:
        TypeError, ValueError: a value is of a wrong kind or out of range; its name is said.

    Example:
        >>> recipe = Recipe.from_dict({"sparsity": 0.95, "train": {"epochs": 3}})
        >>> recipe.override({"train.learning_rate": 0.05}).train
        ... # doctest: +ELLIPSIS
        Training(epochs=3, batch_size=128, learning_rate=0.05, ...)

    Reference:
        TSCNC, arXiv 2503.20454; HYDRA, arXiv 2002.10509; TRADES, arXiv 1901.08573.
    """

    name: str = "experiment"
    seed: int = 0
    sparsity: float = 0.99
    data: Data = dataclasses.field(default_factory=Data)
    network: Network = dataclasses.field(default_factory=Network)
    adversary: Adversary = dataclasses.field(default_factory=Adversary)
    constraints: Constraints = dataclasses.field(default_factory=Constraints)
    gates: Gates = dataclasses.field(default_factory=Gates)
    train: Training = dataclasses.field(default_factory=Training)
    prune: Pruning = dataclasses.field(default_factory=Pruning)
    finetune: FineTuning = dataclasses.field(default_factory=FineTuning)
    evaluate: Evaluation = dataclasses.field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        _checks.file_name("name", self.name)
        for part, kind in get_type_hints(type(self)).items():
            value = getattr(self, part)
            if dataclasses.is_dataclass(kind) and type(value) is not kind:
                raise TypeError(
                    f"{part} must be of {kind}, got {value!r}: nested dicts are for "
                    "Recipe.from_dict."
                )
        _checks.integer("seed", self.seed, minimum=0)
        _checks.sparsity("sparsity", self.sparsity)
        if self.sparsity == 0.0 and self.prune.scope == "condition":
            raise ValueError(
                "sparsity must be > 0 with prune.scope='condition', got 0.0: there is nothing to "
                "share out. Take prune.scope='layer'."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a recipe from nested dicts, as they stand in a YAML file; what lacks is default.

        Raises:
            ValueError: a name is not known; the nearest one is offered.
            TypeError, ValueError: a value is of a wrong kind or out of range.
        """
        return _build(cls, values, "")

    @classmethod
    def from_yaml(cls, path: str | pathlib.Path) -> Self:
        """Read a recipe from a YAML file.

        `base:` in it names another file, or a list of them, beside it, whose values come first; a
        later one overrides the earlier.

        Raises:
            ImportError: PyYAML is not installed.
            OSError: there is no such file, or it can't be read.
            ValueError: it is no YAML, empty or not that of a recipe, a name stands in one place
                twice, or files are based on each other.
        """
        path = pathlib.Path(path)
        values = _read(path, ())
        with errors_begin(f"{path}: "):
            return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as nested dicts of JSON values."""
        return dataclasses.asdict(self)

    def override(self, values: Mapping[str, Any]) -> Self:
        """Return the recipe with other values, by their dotted names, such as "train.epochs".

        Raises:
            ValueError: a name is not known; the nearest one is offered.
            TypeError, ValueError: a value is of a wrong kind or out of range.
        """
        nested = self.to_dict()
        for name, value in values.items():
            *way, last = name.split(".")
            inner = nested
            for key in way:
                inner = inner.get(key) if isinstance(inner, dict) else None  # type: ignore[assignment]
            if not isinstance(inner, dict):
                raise ValueError(_unknown(name, [known for known, _ in self.leaves()]))
            inner[last] = value
        return type(self).from_dict(nested)

    def baseline(self) -> Self:
        """Return the recipe without constraints and gates, and otherwise the same."""
        none = {"constraints.sparsity_factor": 0.0, "constraints.condition_factor": 0.0}
        return self.override({**none, "gates.sparsity_factor": 0.0})

    def first_stage(self) -> dict[str, Any]:
        """Return what the first stage depends on: equal for recipes that can share one."""
        values = self.to_dict()
        constraints, gates = values["constraints"], values["gates"]
        if "train" not in constraints.pop("stages"):
            constraints = None
        gates = {**gates, "a": values["constraints"]["a"]} if gates["sparsity_factor"] else None
        shared = ("seed", "data", "network", "adversary", "train", "evaluate")
        return {name: values[name] for name in shared} | {
            "constraints": constraints,
            "gates": gates,
        }

    @classmethod
    def leaves(cls) -> Iterator[tuple[str, Any]]:
        """Yield the dotted name of each value, and its default."""
        yield from _leaves(cls(), "")


@contextlib.contextmanager
def errors_begin(words: str) -> Iterator[None]:
    """Let errors in what the user gave begin with these words: what it was given for."""
    kinds = (FileNotFoundError, TypeError, ValueError)
    try:
        yield
    except kinds as error:  # or one of a subclass, which may take other arguments
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{words}{error}") from error


def differences(theirs: Any, mine: Any, name: str = "") -> list[str]:
    """Return in words what differs between two recipes, or parts of them, as nested dicts."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return [
            line
            for key in {**theirs, **mine}
            for line in differences(theirs.get(key), mine.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if theirs == mine else [f"{name} was {theirs!r}, not {mine!r}"]


def parse(text: str, where: str) -> Any:
    """Return what a piece of YAML says.

    Args:
        text: YAML.
        where: what the text is, for the error message.

    Returns:
        Dicts, lists, numbers, texts, truth values, None.

    Raises:
        ImportError: PyYAML is not installed.
        ValueError: the text is no YAML, or a name is given twice in one place.

    Example:
        >>> parse("{train: {epochs: 3}}", "text")
        {'train': {'epochs': 3}}
    """
    yaml = _extras.require_extra("yaml", "experiments")
    try:
        tree = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # of a date that there is not, for one
        raise ValueError(f"{where} is not YAML: {error}") from error
    for name, first, second in _repeated(yaml, tree, "", set()):
        raise ValueError(
            f"{where} has {name} twice, in line {first} and in line {second}: keep one of them."
        )
    return values


def read_yaml(path: pathlib.Path) -> dict[str, Any]:
    """Return the values of a YAML file that holds names with values.

    Raises:
        ImportError: PyYAML is not installed.
        OSError: there is no such file, or it can't be read.
        ValueError: it is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: it is no text in UTF-8 ({error}).") from error
    values = parse(text, str(path))
    if values is None:
        raise ValueError(f"{path} is empty, or was cut off: it must hold names with values.")
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names with values, got {values!r}.")
    return values


def _repeated(yaml: Any, node: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, int, int]]:
    """Yield each name that stands twice in one mapping, and the lines: YAML takes the last."""
    if id(node) in seen:  # an alias: it has been looked at
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            yield from _repeated(yaml, inner, prefix, seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[Any, int] = {}
        for key, inner in node.value:
            line, name = key.start_mark.line + 1, f"{prefix}{key.value}"
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in lines:
                    yield name, lines[key.tag, key.value], line
                lines[key.tag, key.value] = line
            yield from _repeated(yaml, inner, f"{name}.", seen)


def _read(path: pathlib.Path, above: tuple[pathlib.Path, ...]) -> dict[str, Any]:
    """Return the values of a file over those of the files that it is based on."""
    path = path.resolve()
    if path in above:
        raise ValueError(f"{path} is based on itself, by {[str(file) for file in above]}.")
    values = read_yaml(path)
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise TypeError(
            f"{path}: base must be the name of a file or a list of them, got {bases!r}."
        )
    result: dict[str, Any] = {}
    for base in bases:
        result = _merged(result, _read(path.parent / base, (*above, path)))
    return _merged(result, values)


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{prefix.rstrip('.') or 'a recipe'} must be names with values, got {values!r}."
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(_unknown(f"{prefix}{name}", [f"{prefix}{known}" for known in fields]))
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            arguments[name] = _build(kind, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            arguments[name] = _number(value) if kind is float else value
    with errors_begin(prefix):
        return cls(**arguments)


def _number(value: Any) -> Any:
    """Return a float for what YAML 1.1 takes for text, such as 1e-5; other values as they are."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    offer = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
    return f"{name} is not a value of a recipe: {offer}"


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from _leaves(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", inner
