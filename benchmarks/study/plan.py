"""What a study runs: settings, arms, methods, sparsities and seeds, from a YAML file."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tscnc_tf import _checks
from tscnc_tf.experiments import Recipe
from tscnc_tf.experiments.recipe import read_yaml

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment of a study.

    Attributes:
        setting, arm, method, sparsity, seed: where it stands in the study.
        recipe: what is run.
        dense: the arm that trains the dense network that this one begins with: the first in the
            plan whose first stage is the same.
    """

    setting: str
    arm: str
    method: str
    sparsity: float
    seed: int
    recipe: Recipe
    dense: str

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.arm}-{self.method}-{100 * self.sparsity:g}-seed{self.seed}"

    @property
    def group(self) -> str:
        """Of the runs that begin with the same dense network."""
        return f"{self.setting}/{self.dense}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        name: of the study, and of its folder of results.
        seeds: each arm is run with each.
        methods: ways of pruning.
        sparsities: fractions of zeros.
        settings: by name, values of a recipe: data, network, epochs.
        arms: by name, values of a recipe by their dotted names: what the arm changes.
        settled: by setting and arm, such values as were chosen on the validation set.
        choices: by arm, a dotted name and the values to choose from.
        only: by arm, the sparsities that it is run at, where these are not all.
    """

    name: str
    seeds: tuple[int, ...]
    methods: tuple[str, ...]
    sparsities: tuple[float, ...]
    settings: Mapping[str, Mapping[str, Any]]
    arms: Mapping[str, Mapping[str, Any]]
    settled: Mapping[str, Mapping[str, Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    choices: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    only: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _checks.file_name("name", self.name)
        for names in ("settings", "arms"):
            for name in getattr(self, names):
                _checks.file_name(f"a name in {names}", name)

    @classmethod
    def read(cls, path: pathlib.Path, files: Mapping[str, str] | None = None) -> Plan:
        """Read a plan from a YAML file.

        Args:
            path: of the file.
            files: where data are that the plan knows by name.

        Raises:
            OSError: there is no such file, or it can't be read.
            ValueError: it is no plan, or a name in it can't be that of a file.
        """
        values = read_yaml(path)
        fields = dataclasses.fields(cls)
        needed = {f.name for f in fields if f.default_factory is dataclasses.MISSING}
        if not needed <= set(values) <= {field.name for field in fields}:
            raise ValueError(
                f"{path} is no plan: it must hold {sorted(needed)}, got {sorted(values)}."
            )
        for setting in values["settings"].values():
            name = setting["data"]["dataset"]
            setting["data"]["dataset"] = (files or {}).get(name, name)
        for name in ("seeds", "methods", "sparsities"):
            values[name] = tuple(values[name])
        return cls(**values)

    def runs(self) -> Iterator[Run]:
        """Yield all runs: seed by seed, so that what is there is balanced at any time."""
        for seed in self.seeds:
            for setting in self.settings:
                recipes = {arm: self._recipe(setting, arm, seed, {}) for arm in self.arms}
                for arm in self.arms:
                    yield from self._runs(setting, arm, recipes)

    def runs_of(
        self, setting: str, arm: str, seed: int, changes: Mapping[str, Any] | None = None
    ) -> Iterator[Run]:
        """Yield the runs of one arm, which begin with the same dense network."""
        recipes = {each: self._recipe(setting, each, seed, changes or {}) for each in self.arms}
        yield from self._runs(setting, arm, recipes)

    def _runs(self, setting: str, arm: str, recipes: Mapping[str, Recipe]) -> Iterator[Run]:
        recipe = recipes[arm]
        first = recipe.first_stage()
        dense = next(each for each, other in recipes.items() if other.first_stage() == first)
        for method in self.methods:
            for sparsity in self.only.get(arm, self.sparsities):
                values = {"prune.method": method, "sparsity": sparsity}
                changed = recipe.override(values)
                yield Run(setting, arm, method, sparsity, recipe.seed, changed, dense)

    def _recipe(self, setting: str, arm: str, seed: int, changes: Mapping[str, Any]) -> Recipe:
        recipe = Recipe.from_dict(self.settings[setting]).baseline()
        recipe = recipe.override(self.arms[arm])
        recipe = recipe.override(self.settled.get(setting, {}).get(arm, {}))
        return recipe.override({**changes, "seed": seed})
