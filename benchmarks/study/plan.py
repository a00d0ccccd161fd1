"""What a study runs: settings, arms, sparsities, seeds and the tuning, from a YAML file."""

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
EVERY = "every"  # stands for all arms of a setting, and for all that have no values of their own

# Where a run stands in a study.
PLACE = ("setting", "arm", "trial", "sparsity", "seed")

Found = Mapping[tuple[Any, ...], Mapping[str, Any]]  # what runs have left, by where they stand


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment of a study.

    Attributes:
        setting, arm, sparsity, seed: where it stands in the study.
        trial: of a trial the values that it tries, such as "finetune.learning_rate=0.02"; empty
            for a run whose network is judged on the test set.
        recipe: what is run.
    """

    setting: str
    arm: str
    trial: str
    sparsity: float
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its files."""
        parts = (self.arm, self.trial, f"{100 * self.sparsity:g}", f"seed{self.seed}")
        return "-".join(part for part in parts if part)

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it stands: the values of `PLACE`."""
        return tuple(getattr(self, name) for name in PLACE)

    @functools.cached_property
    def dense(self) -> str:
        """The name of the dense network that is pruned; equal where it is the same network."""
        return self.recipe.dense_name()

    @property
    def group(self) -> str:
        """The name of the runs that begin with the same dense network."""
        return f"{self.setting}/{self.dense}"


class Choice(NamedTuple):
    """One round of the tuning of an arm.

    Attributes:
        names: dotted names of values of a recipe that get the same value.
        values: to choose from.
    """

    names: tuple[str, ...]
    values: tuple[Any, ...]


Tried = Sequence[tuple[Choice, Any]]  # values, and what they were chosen from


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the arms of a setting are tuned, one round after the other.

    In each round every value is tried, with what the rounds before have chosen, and with each seed.
    The value is chosen whose networks have the best mean accuracy under attack on the validation
    images after fine-tuning; of equals the first.

    Attributes:
        seeds: for the trials; none that the study itself uses.
        sparsity: of the trials; an arm that is not run at it is tuned at its highest.
        rounds: for each round the choices by arm; `EVERY` for arms without one of their own.
    """

    seeds: tuple[int, ...]
    sparsity: float
    rounds: tuple[Mapping[str, Choice], ...]

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tuning:
        """Build it from the values in a plan.

        Raises:
            ValueError: in a round some arms have more values than others.
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
                    f"round {number} of the tuning must offer {EVERY!r} arm, and each arm that it "
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
        name: of the study, and of its table of results.
        seeds: each arm is run with each.
        settings: by name, values of a recipe: data, network, epochs.
        arms: by name, values of a recipe by their dotted names: what the arm changes. An arm whose
            `base` names another one begins with the values of that; one with `sparsities` is run
            at these, whatever the grid says.
        grid: by setting, which arms are run at which sparsities: a list of mappings with `arms`
            (or "every") and `sparsities`.
        against: the arms that all others are compared with.
        tuning: by setting, how its arms are tuned; a setting without it runs the arms as they are.
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
        for name in ("seeds", "against"):
            values[name] = tuple(values[name])
        tuning = values.get("tuning", {})
        values["tuning"] = {setting: Tuning.of(each) for setting, each in tuning.items()}
        return cls(**values)

    def base(self, arm: str) -> str | None:
        """Return the arm that another one adds to, None if it stands for itself."""
        return self.arms[arm].get("base")

    def sparsities(self, setting: str, arm: str) -> list[float]:
        """Return at what sparsities an arm is run."""
        rows = [row for row in self.grid[setting] if row["arms"] == EVERY or arm in row["arms"]]
        own = self.arms[arm].get("sparsities")
        return own if rows and own else [level for row in rows for level in row["sparsities"]]

    def wanted(self, found: Found) -> list[Run]:
        """Return the trials and the runs that can be begun, or have been, given what there is."""
        return [*self.trials(found), *self.runs(found)]

    def runs(self, found: Found) -> Iterator[Run]:
        """Yield the runs of the arms that are tuned: seed by seed, so that they are balanced."""
        arms = [(setting, arm) for setting in self.settings for arm in self.arms]
        chosen = {each: self._chosen(found, *each) for each in arms}
        for seed in self.seeds:
            for (setting, arm), choices in chosen.items():
                if choices is not None:
                    for sparsity in self.sparsities(setting, arm):
                        yield self._run(setting, arm, sparsity, seed, choices)

    def trials(self, found: Found) -> Iterator[Run]:
        """Yield the trials of the rounds of tuning that can be begun, or have been."""
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

        That is None if trials are missing.
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
        """Return a trial; where its last value changes nothing, the one of the round before."""
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
        """Return what an arm changes in a recipe, its base's changes first."""
        others = ("base", "sparsities")
        own = {name: value for name, value in self.arms[arm].items() if name not in others}
        base = self.base(arm)
        return own if base is None else {**self._values(base), **own}


def score(content: Mapping[str, Any]) -> float:
    """Return what trials are compared by: robust accuracy on the validation images at the end."""
    return content["validation"]["finetune"]["robust"]


def _name(tried: Tried) -> str:
    """Return the name of a trial: what it tries, and what rounds before it have chosen."""
    return ",".join(f"{choice.names[0]}={value}" for choice, value in tried)
