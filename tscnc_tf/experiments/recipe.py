"""Recipes: every setting of an experiment in one value, checked when it is built."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Self

from tscnc_tf import _extras, _files
from tscnc_tf.experiments.parts import (
    Adversary,
    Checked,
    Constraints,
    CountOrZero,
    Data,
    Evaluation,
    FineTuning,
    Gates,
    Name,
    Network,
    Pruning,
    Sparsity,
    Training,
    hints,
)

SHIPPED = pathlib.Path(__file__).parent / "recipes"
# The first stage doesn't depend on the evaluation on the test set. The names of dense networks are
# digests with these values in them, which are therefore not the defaults of today.
_ANY_TEST: dict[str, Any] = {"attack": "pgd", "steps": 50, "restarts": 5}


@dataclasses.dataclass(frozen=True)
class Recipe(Checked):
    r"""Every setting of an experiment: the data, the network and the stages.

    Where they are known, the defaults are the values of the TSCNC paper's authors: :math:`\epsilon
    = 8/255`, PGD-10 with steps of 0.0069, SGD at 0.1 with Nesterov momentum 0.9, batches of 128,
    200 epochs with the learning rate times 0.2 after 30, 60 and 80 % of them (60, 120 and 160),
    weight averages of 0.99; then 20 epochs of pruning by scores, as in HYDRA, and fine-tuning at
    0.01. The others (factors of the constraints, weight decay, the length of the fine-tuning) are
    this package's own.

    Args:
        name: the name of the experiment, which must be usable as the name of a folder.
        seed: seed of everything that is random: splits, initial weights, batches, augmentation,
            attacks.
        sparsity: fraction of zeros among the weights that are pruned, in [0, 1).
        data, network, adversary, constraints, gates: settings that all stages share.
        train, prune, finetune: the three stages of training.
        evaluate: the evaluation on the test set.

    Raises:
        TypeError, ValueError: a value is of a wrong type or out of range; the message names it.

    Example:
        >>> recipe = Recipe.from_dict({"sparsity": 0.95, "train": {"epochs": 3}})
        >>> recipe.override({"train.learning_rate": 0.05}).train
        ... # doctest: +ELLIPSIS
        Training(epochs=3, batch_size=128, learning_rate=0.05, ...)
        >>> Recipe.from_yaml("paper").gates.layers
        'stage_*'

    Reference:
        TSCNC, arXiv 2503.20454; HYDRA, arXiv 2002.10509; TRADES, arXiv 1901.08573.
    """

    name: Name = "experiment"
    seed: CountOrZero = 0
    sparsity: Sparsity = 0.99
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
        super().__post_init__()
        for part, kind in hints(type(self)).items():
            value = getattr(self, part)
            if dataclasses.is_dataclass(kind) and type(value) is not kind:
                raise TypeError(
                    f"{part} must be of {kind}, got {value!r}: nested dicts are for "
                    "Recipe.from_dict."
                )
        if self.sparsity == 0.0 and self.prune.scope == "condition":
            raise ValueError(
                "sparsity must be > 0 with prune.scope='condition', got 0.0: there is nothing to "
                "share out. Take prune.scope='layer'."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a recipe from nested dicts; values that are not given keep their defaults.

        Raises:
            ValueError: a name is unknown; the message suggests the nearest one.
            TypeError, ValueError: a value is of a wrong type or out of range.
        """
        return _build(cls, values, "")

    @classmethod
    def from_yaml(cls, path: str | pathlib.Path) -> Self:
        """Read a recipe from a YAML file.

        The entry `base` names a recipe, or a list of them, whose values come first; later ones
        override earlier ones. A path in it is relative to the file.

        Args:
            path: the file, or one of the names of the recipes of this package: "recommended"
                (the simplest of the best in the study of this package), "paper" (the values of the
                method's authors, with constraints and gates), "cpu" (the recommended one, reduced
                to minutes on two cores), "smoke" (seconds). A file with such a name is given as
                "./paper".

        Raises:
            ImportError: PyYAML is not installed.
            OSError: the file is missing or can't be read.
            TypeError: `path` is not a path.
            ValueError: the file is not YAML, empty or not a recipe, it sets a name twice, or files
                are based on each other.
        """
        _files.absolute("path", path)
        file = _located(path, pathlib.Path())
        values = _read(file, ())
        with errors_begin(f"{file}: "):
            return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as nested dicts of JSON values."""
        return dataclasses.asdict(self)

    def override(self, values: Mapping[str, Any]) -> Self:
        """Return the recipe with other values, by their dotted names, such as "train.epochs".

        Raises:
            ValueError: a name is unknown, in which case the message suggests the nearest one, or it
                is that of a section.
            TypeError, ValueError: a value is of a wrong type or out of range, or `values` is no
                mapping.
        """
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise TypeError(f"values must map names, such as 'train.epochs', got {values!r}.")
        nested = self.to_dict()
        known = [name for name, _ in self.leaves()]
        for name, value in values.items():
            if inside := [leaf for leaf in known if leaf.startswith(f"{name}.")]:
                raise ValueError(
                    f"{name} is a section of a recipe, and not a value: give its values by their "
                    f"own names, such as {inside[0]}."
                )
            *sections, last = name.split(".")
            inner: Any = nested
            for section in sections:
                inner = inner.get(section) if isinstance(inner, dict) else None
            if not isinstance(inner, dict):
                raise ValueError(_unknown(name, known))
            inner[last] = value
        return type(self).from_dict(nested)

    def baseline(self) -> Self:
        """Return the same recipe without constraints and gates."""
        none = {"constraints.sparsity_factor": 0.0, "constraints.condition_factor": 0.0}
        return self.override({**none, "gates.sparsity_factor": 0.0})

    def first_stage(self) -> Self:
        """Return the recipe with defaults for all values that the first stage does not depend on.

        Recipes for which it is equal can share that stage.
        """
        constraints, gates = self.constraints, self.gates
        if not gates.sparsity_factor:
            gates = Gates()
        if "train" in constraints.stages and (
            constraints.sparsity_factor or constraints.condition_factor
        ):
            constraints = dataclasses.replace(constraints, stages=("train",))
        else:
            shape = constraints.a if gates.sparsity_factor else Constraints.a
            constraints = Constraints(sparsity_factor=0.0, condition_factor=0.0, a=shape)
        return dataclasses.replace(
            type(self)(),
            seed=self.seed,
            data=self.data,
            network=self.network,
            adversary=self.adversary,
            constraints=constraints,
            gates=gates,
            train=self.train,
            evaluate=dataclasses.replace(self.evaluate, **_ANY_TEST),
        )

    def dense_name(self) -> str:
        """Return a name for the dense network, the same for all recipes with this first stage."""
        text = json.dumps(self.first_stage().to_dict(), sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:8]}-seed{self.seed}"

    @classmethod
    def leaves(cls) -> Iterator[tuple[str, Any]]:
        """Yield the dotted name of each value, and its default."""
        defaults = cls()
        for field in dataclasses.fields(cls):
            value = getattr(defaults, field.name)
            if dataclasses.is_dataclass(value):
                for inner in dataclasses.fields(value):
                    yield f"{field.name}.{inner.name}", getattr(value, inner.name)
            else:
                yield field.name, value


@contextlib.contextmanager
def errors_begin(prefix: str) -> Iterator[None]:
    """Put a prefix before the message of an error in the user's input."""
    kinds = (FileNotFoundError, TypeError, ValueError)
    try:
        yield
    except kinds as error:  # a subclass may take other arguments
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{prefix}{error}") from error


def differences(theirs: Any, mine: Any, name: str = "") -> list[str]:
    """Return a line for each difference between two recipes, given as nested dicts."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        return [
            line
            for key in {**theirs, **mine}
            for line in differences(theirs.get(key), mine.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if theirs == mine else [f"{name} was {theirs!r}, not {mine!r}"]


# Of a file of YAML, with all aliases written out.
_MOST_VALUES = 10_000


def parse(text: str, where: str) -> Any:
    """Parse YAML into dicts, lists, numbers, strings, booleans and None.

    Nothing in the text is executed or imported.

    Args:
        text: YAML.
        where: the name of the text, for the error message.

    Raises:
        ImportError: PyYAML is not installed.
        TypeError: `text` is not a string.
        ValueError: the text is not YAML, or a mapping has a name twice.

    Example:
        >>> parse("{train: {epochs: 3}}", "text")
        {'train': {'epochs': 3}}
    """
    yaml = _extras.require_extra("yaml", "experiments")
    if not isinstance(text, str):
        raise TypeError(f"text must be text of YAML, got {text!r} of type {type(text).__name__}.")
    try:
        tree = yaml.compose(text, yaml.SafeLoader)
        is_small = _size(yaml, tree, {}) <= _MOST_VALUES
        values = yaml.safe_load(text) if is_small else None
    except RecursionError:
        raise ValueError(f"{where} can't be read: its values are nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that does not exist
        raise ValueError(f"{where} is not YAML: {error}") from error
    if not is_small:
        raise ValueError(
            f"{where} can't be read: it has more than {_MOST_VALUES:,} values, if each alias "
            "(*name) is written out, or an alias that contains itself."
        )
    for name, first, second in _repeated(yaml, tree, "", set()):
        raise ValueError(
            f"{where} has {name} twice, in line {first} and in line {second}: keep one of them."
        )
    return values


def read_yaml(path: pathlib.Path) -> dict[str, Any]:
    """Return the content of a YAML file that holds a mapping.

    Raises:
        ImportError: PyYAML is not installed.
        OSError: the file is missing or can't be read.
        ValueError: the file holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: it is not text in UTF-8 ({error}).") from error
    values = parse(text, str(path))
    if values is None:
        raise ValueError(
            f"{path} is empty, or was cut off: it must hold a mapping of names to values."
        )
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of names to values, got {values!r}.")
    return values


def _size(yaml: Any, node: Any, known: dict[int, float]) -> float:
    """Return the number of values below a node with all aliases written out; infinite for a cycle.

    Each alias of a list of aliases multiplies it: a few hundred bytes can fill the memory.
    """
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known, so that a cycle ends
        inner: list[Any] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        known[id(node)] = 1.0 + sum(_size(yaml, each, known) for each in inner)
    return known[id(node)]


def _repeated(yaml: Any, node: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, int, int]]:
    """Yield each name that a mapping has twice, with both lines; PyYAML uses the last."""
    if id(node) in seen:  # an alias of a node above
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


def _located(path: str | pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Return the file of a recipe: one of this package by its name, or one relative to a folder."""
    shipped = SHIPPED / f"{path}.yaml"
    is_name = isinstance(path, str) and path == shipped.stem and shipped.is_file()
    file = shipped if is_name else folder / path
    if not file.suffix and not file.exists():
        names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.yaml")))
        raise FileNotFoundError(f"there is no file {file}; the recipes by name are {names}.")
    return file


def _read(path: pathlib.Path, above: tuple[pathlib.Path, ...]) -> dict[str, Any]:
    """Return the values of a file, on top of those of the files that it is based on."""
    path = path.resolve()
    if path in above:
        raise ValueError(f"{path} is based on itself, by {[str(file) for file in above]}.")
    return with_bases(read_yaml(path), path, (*above, path))


def with_bases(
    values: Mapping[str, Any], path: pathlib.Path, above: tuple[pathlib.Path, ...] = ()
) -> dict[str, Any]:
    """Return values of a recipe on top of those of the files that their entry `base` names.

    Args:
        values: the content of a file.
        path: of that file.
        above: the files that are based on these values; `base` may not name them.

    Raises:
        OSError, TypeError, ValueError: `base` does not name files, or one of them is not a recipe.
    """
    own = dict(values)
    bases = own.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise TypeError(
            f"{path}: base must be the name of a file or a list of them, got {bases!r}."
        )
    result: dict[str, Any] = {}
    for base in bases:
        result = merged(result, _read(_located(base, path.parent), above))
    return merged(result, own)


def merged(below: Any, above: Any, cls: Any = Recipe) -> Any:
    """Return the values of a recipe, or of a section of it: those of `above`, else of `below`.

    Only sections are merged: a value that is a mapping itself, such as a scope, is replaced.
    """
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    result = {**below, **above}
    for name, kind in hints(cls).items():
        if dataclasses.is_dataclass(kind) and name in below and name in above:
            result[name] = merged(below[name], above[name], kind)
    return result


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{prefix.rstrip('.') or 'a recipe'} must be a mapping of names to values, "
            f"got {values!r}."
        )
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(_unknown(f"{prefix}{name}", [f"{prefix}{known}" for known in fields]))
        kind = hints(cls)[name]
        if dataclasses.is_dataclass(kind):
            arguments[name] = _build(kind, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            arguments[name] = _number(value) if kind is float else value
    with errors_begin(prefix):
        return cls(**arguments)


def _number(value: Any) -> Any:
    """Return a number that YAML 1.1 reads as a string, such as 1e-5, as a float."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    offer = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
    return f"{name} is not a value of a recipe: {offer}"
