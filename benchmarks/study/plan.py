"""The plan of a study from a YAML file: settings, arms, sparsities, seeds and tuning."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tscnc_tf import _checks
from tscnc_tf.experiments import Recipe
from tscnc_tf.experiments.recipe import read_yaml

HERE = pathlib.Path(__file__).parent
EVERY = "every"  # all arms of a setting, or those without values of their own

# The key of a run in a study.
PLACE = ("setting", "arm", "trial", "sparsity", "seed")

Found = Mapping[tuple[Any, ...], Mapping[str, Any]]  # results of runs by their places


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment of a study.

    Attributes:
        setting, arm, sparsity, seed: its place in the study.
        trial: for a trial of the tuning, the values that it tries, such as
            "finetune.learning_rate=0.02"; empty for a run that is evaluated on the test set.
        recipe: the recipe of the experiment.
    """

    setting: str
    arm: str
    trial: str
    sparsity: float
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """The name of its files."""
        parts = (self.arm, self.trial, f"{100 * self.sparsity:g}", f"seed{self.seed}")
        return "-".join(part for part in parts if part)

    @property
    def place(self) -> tuple[Any, ...]:
        """The values of `PLACE`."""
        return tuple(getattr(self, name) for name in PLACE)

    @functools.cached_property
    def dense(self) -> str:
        """The name of the dense network that is pruned; equal networks have equal names."""
        return self.recipe.dense_name()

    @property
    def group(self) -> str:
        """The name of the runs that begin with the same dense network."""
        return f"{self.setting}/{self.dense}"


class Choice(NamedTuple):
    """One round of the tuning of an arm.

    Attributes:
        names: dotted names in a recipe, which all get the same value.
        values: the values to choose from.
    """

    names: tuple[str, ...]
    values: tuple[Any, ...]


Tried = Sequence[tuple[Choice, Any]]  # choices, and the chosen or tried value of each


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the arms of a setting are tuned, one round after the other.

    Each round tries every value with each seed, and with the values that previous rounds have
    chosen. It chooses the value with the best mean accuracy under attack on the validation images
    after fine-tuning; if several are equal, the first.

    Attributes:
        seeds: the seeds of the trials, none of which the study itself uses.
        sparsity: the sparsity of the trials; an arm that is not run at it is tuned at its highest.
        rounds: for each round, the choices by arm; `EVERY` for arms without one of their own.
    """

    seeds: tuple[int, ...]
    sparsity: float
    rounds: tuple[Mapping[str, Choice], ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tuning:
        """Return the tuning from its values in a plan.

        Raises:
            ValueError: arms have different numbers of values in a round.
        """
        rounds = []
        for number, choices in enumerate(values["rounds"], start=1):
            made = {
                arm: Choice(tuple(choice["names"]), tuple(choice["values"]))
                for arm, choice in choices.items()
            }
            counts = {arm: len(choice.values) for arm, choice in made.items()}
            if len(set(counts.values())) > 1 or EVERY not in made:
                raise ValueError(
                    f"round {number} of the tuning must give {EVERY!r}, and each arm that it "
                    f"names, the same number of values, got {counts}."
                )
            rounds.append(made)
        return cls(tuple(values["seeds"]), values["sparsity"], tuple(rounds))

    def choices(self, arm: str) -> list[Choice]:
        """Return the rounds of an arm."""
        return [choices.get(arm, choices[EVERY]) for choices in self.rounds]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        name: the name of the study, and of its table of results.
        seeds: the seeds that each arm is run with.
        settings: by name, the values of a recipe: data, network, epochs.
        arms: by name, the values that the arm changes, by their dotted names in a recipe. An arm
            with `base` adds to the values of that arm. An arm with `sparsities` is run at these,
            whatever the grid says.
        grid: by setting, which arms are run at which sparsities: a list of mappings with `arms`
            (or "every") and `sparsities`.
        against: the arms that all others are compared with.
        tuning: by setting, how its arms are tuned; arms of other settings are not tuned.
    """

    name: str
    seeds: tuple[int, ...]
    settings: Mapping[str, Mapping[str, Any]]
    arms: Mapping[str, Mapping[str, Any]]
    grid: Mapping[str, Sequence[Mapping[str, Any]]]
    against: tuple[str, ...]
    tuning: Mapping[str, Tuning] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _checks.file_name("name", self.name)
        for names in ("settings", "arms"):
            for name in getattr(self, names):
                _checks.file_name(f"a name in {names}", name)
        named = [*self.against, *(b for b in map(self.base, self.arms) if b)]
        for rows in self.grid.values():
            named += [arm for row in rows for arm in row["arms"] if row["arms"] != EVERY]
        for tuning in self.tuning.values():
            named += [arm for choices in tuning.rounds for arm in choices if arm != EVERY]
            if shared := set(tuning.seeds) & set(self.seeds):
                raise ValueError(f"seeds of the tuning must be none of the study, got {shared}.")
        if unknown := [arm for arm in named if arm not in self.arms]:
            raise ValueError(f"{unknown[0]!r} is none of the arms {list(self.arms)}.")
        if set(self.grid) != set(self.settings) or not set(self.tuning) <= set(self.settings):
            raise ValueError(f"grid and tuning must be of the settings {list(self.settings)}.")

    @classmethod
    def read(cls, path: pathlib.Path, files: Mapping[str, str] | None = None) -> Plan:
        """Read a plan from a YAML file.

        Args:
            path: the path of the file.
            files: the paths of data sets, by their names in the plan.

        Raises:
            OSError: there is no such file, or it can't be read.
            ValueError: it is not a plan, or a name in it can't be the name of a file.
        """
        values = read_yaml(path)
        fields = dataclasses.fields(cls)
        needed = {f.name for f in fields if f.default_factory is dataclasses.MISSING}
        if not needed <= set(values) <= {field.name for field in fields}:
            raise ValueError(
                f"{path} is not a plan: it must have {sorted(needed)}, got {sorted(values)}."
            )
        for setting in values["settings"].values():
            name = setting["data"]["dataset"]
            setting["data"]["dataset"] = (files or {}).get(name, name)
        for name in ("seeds", "against"):
            values[name] = tuple(values[name])
        tuning = values.get("tuning", {})
        values["tuning"] = {setting: Tuning.of(each) for setting, each in tuning.items()}
        return cls(**values)

    def base(self, arm: str) -> str | None:
        """Return the arm that `arm` adds to; None if it has no base."""
        return self.arms[arm].get("base")

    def sparsities(self, setting: str, arm: str) -> list[float]:
        """Return the sparsities that an arm is run at."""
        rows = [row for row in self.grid[setting] if row["arms"] == EVERY or arm in row["arms"]]
        own = self.arms[arm].get("sparsities")
        return own if rows and own else [level for row in rows for level in row["sparsities"]]

    def wanted(self, found: Found) -> list[Run]:
        """Return the trials and runs that, given the results, are finished or can be begun."""
        return [*self.trials(found), *self.runs(found)]

    def runs(self, found: Found) -> Iterator[Run]:
        """Yield the runs of arms whose tuning is complete, seed by seed.

        Of each seed, the first sparsity of all arms comes first, then their second one, and so on:
        an interim table compares arms.
        """
        arms = [(setting, arm) for setting in self.settings for arm in self.arms]
        chosen = {each: self._chosen(found, *each) for each in arms}
        levels = [
            (place, sparsity, *each, choices)
            for each, choices in chosen.items()
            if choices is not None
            for place, sparsity in enumerate(self.sparsities(*each))
        ]
        levels.sort(key=lambda level: level[0])
        for seed in self.seeds:
            for _, sparsity, setting, arm, choices in levels:
                yield self._run(setting, arm, sparsity, seed, choices)

    def trials(self, found: Found) -> Iterator[Run]:
        """Yield the trials of those rounds of tuning that are finished or can be begun."""
        for setting, tuning in self.tuning.items():
            for arm in self.arms:
                if not self.sparsities(setting, arm):
                    continue
                runs: dict[tuple[Any, ...], Run] = {}
                before: Tried = ()
                for choice, best in self._rounds(found, setting, arm):
                    for seed in tuning.seeds:
                        for value in choice.values:
                            run = self._trial(setting, arm, seed, (*before, (choice, value)))
                            runs[run.place] = run
                    before = (*before, (choice, best))
                yield from runs.values()

    def tuned(self, found: Found, setting: str, arm: str) -> dict[str, Any]:
        """Return the value that each completed round has chosen, by the first of its names."""
        rounds = self._rounds(found, setting, arm)
        return {choice.names[0]: best for choice, best in rounds if best is not None}

    def _chosen(self, found: Found, setting: str, arm: str) -> Tried | None:
        """Return what the tuning of an arm has chosen, None if it is not complete."""
        rounds = self._rounds(found, setting, arm)
        return None if any(best is None for _, best in rounds) else tuple(rounds)

    def _rounds(self, found: Found, setting: str, arm: str) -> list[tuple[Choice, Any]]:
        """Return the rounds of an arm that can be begun, and the value that each has chosen.

        The value is None if trials are missing.
        """
        rounds: list[tuple[Choice, Any]] = []
        if setting not in self.tuning or not self.sparsities(setting, arm):
            return rounds
        tuning = self.tuning[setting]
        for choice in tuning.choices(arm):
            scores = []
            for value in choice.values:
                tried = (*rounds, (choice, value))
                places = [self._trial(setting, arm, s, tried).place for s in tuning.seeds]
                if all(place in found for place in places):
                    scores.append(float(np.mean([score(found[place]) for place in places])))
            is_complete = len(scores) == len(choice.values)
            rounds.append((choice, choice.values[int(np.argmax(scores))] if is_complete else None))
            if not is_complete:
                break
        return rounds

    def _trial(self, setting: str, arm: str, seed: int, tried: Tried) -> Run:
        """Return a trial; if its last value changes nothing, the trial of the previous round."""
        sparsities, wanted = self.sparsities(setting, arm), self.tuning[setting].sparsity
        sparsity = wanted if wanted in sparsities else max(sparsities)
        run = self._run(setting, arm, sparsity, seed, tried, _name(tried))
        before = self._trial(setting, arm, seed, tried[:-1]) if tried[1:] else run
        return before if before.recipe == run.recipe else run

    def _run(
        self, setting: str, arm: str, sparsity: float, seed: int, tried: Tried, trial: str = ""
    ) -> Run:
        recipe = Recipe.from_dict(self.settings[setting]).baseline().override(self._values(arm))
        chosen = {name: value for choice, value in tried for name in choice.names}
        recipe = recipe.override({**chosen, "sparsity": sparsity, "seed": seed})
        return Run(setting, arm, trial, sparsity, seed, recipe)

    def _values(self, arm: str) -> dict[str, Any]:
        """Return the values that an arm, with its base, changes in a recipe."""
        others = ("base", "sparsities")
        own = {name: value for name, value in self.arms[arm].items() if name not in others}
        base = self.base(arm)
        return own if base is None else {**self._values(base), **own}


def score(content: Mapping[str, Any]) -> float:
    """Return the figure that trials are compared by: the final validation robust accuracy."""
    return content["validation"]["finetune"]["robust"]


def _name(tried: Tried) -> str:
    """Return the name of a trial: its value, and those that previous rounds have chosen."""
    return ",".join(f"{choice.names[0]}={value}" for choice, value in tried)
