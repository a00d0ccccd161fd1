"""Arms: sequences of stages of training, each of which inherits the network of the previous."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import pathlib
import platform
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import progress
from batches import Epoch, Images
from programs import Bundle, Program, State

_NETWORK = ("model", "pruner", "other")  # roles; the others are for training only


class Stage:
    """An exported stage: its settings, and its programs over one state."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.settings = json.loads((folder / "stage.json").read_text())
        for file, key in (("programs.json", "programs_sha256"), ("state.npz", "state_sha256")):
            if hashlib.sha256((folder / file).read_bytes()).hexdigest() != self.settings[key]:
                raise ValueError(f"{folder / file} is not the file that was exported.")
        self.bundle = Bundle(folder)

    @functools.cached_property
    def fresh(self) -> dict[str, np.ndarray]:
        """The exported state."""
        return self.bundle.initial()

    @functools.cache  # noqa: B019  a stage lives as long as the process
    def program(self, name: str) -> Program:
        """Return one of the programs."""
        return self.bundle.program(name)


class Arm:
    """Executes an arm in pieces of work; a piece is a batch.

    Args:
        folder: the folder of `export_stage`.
        data: the folder of `prepare.py`.
        output: the folder for checkpoints and results; the work continues from a checkpoint there.
        network: a file `STAGE-best.npz` of another arm, whose network the first stage inherits as
            from a previous stage; None if it begins with its own.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        data: pathlib.Path,
        output: pathlib.Path,
        network: pathlib.Path | None = None,
    ) -> None:
        self._name, self._data, self._output = folder.resolve().name, data, output
        names = json.loads((folder / "arm.json").read_text())["stages"]
        self._stages = [Stage(folder / name) for name in names]
        parts = [folder / "arm.json", *(folder / name / "stage.json" for name in names)]
        parts += [data / "data.json", *([] if network is None else [network])]
        self._hash = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()
        self._pace = progress.Pace()
        self._logs: dict[str, Any] = {}
        self._candidate: State = {}
        self._state: State = {}
        self._best: State = {}
        self._network: State = {}
        self.position = progress.Position()
        output.mkdir(parents=True, exist_ok=True)
        if self._checkpoint.exists():
            self.position, arrays = progress.load(self._checkpoint, self._hash)
            self._state = _on_device(arrays["state"])
            self._best, self._network = arrays["best"], arrays["network"]
        elif network is not None:
            with np.load(network) as held:
                self._network = {name: held[name] for name in held.files}

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.position.phase == "done"

    @property
    def compiles_next(self) -> bool:
        """Whether the next piece of work begins with compiling, which may take minutes."""
        return self._pace.is_new(self.position.stage, self.position.phase)

    def advance(self) -> None:
        """Do the next piece of work."""
        stage, phase = self.position.stage, self.position.phase
        getattr(self, f"_{phase}")()
        self.position.seconds += self._pace.lap(stage, phase)

    def save(self) -> None:
        """Write the checkpoint, the metrics, and at the end the result."""
        lines = "".join(json.dumps(line) + "\n" for line in self.position.lines)
        progress.write_text(self._output / "metrics.jsonl", lines)
        if self.done:
            text = json.dumps(self.result(), indent=1) + "\n"
            progress.write_text(self._output / "result.json", text)
        # Last, so that all that it counts as done has been written.
        arrays = {"state": self._state, "best": self._best, "network": self._network}
        progress.save(self._checkpoint, self._hash, self.position, arrays)

    def result(self) -> dict[str, Any]:
        """Return the content of `result.json`."""
        last, counts = self._stages[-1].settings, self.position.counts
        examples = counts["examples"]
        return {
            "arm": self._name,
            "sha256": self._hash,
            "test": {
                **counts,
                "clean_accuracy": counts["clean"] / examples,
                "attacked_accuracy": counts["attacked"] / examples,
                "attack": last["test_attack"] or last["attack"],
                "batch_size": last["evaluation_batch_size"],
                "seed": last["evaluation_seed"],
            },
            "chosen": self.position.chosen,
            "stages": [stage.settings for stage in self._stages],
            "data": json.loads((self._data / "data.json").read_text()),
            "device": jax.devices()[0].device_kind,
            "versions": {
                "python": platform.python_version(),
                "jax": jax.__version__,
                "numpy": np.__version__,
            },
            "seconds": self.position.seconds,
        }

    def describe(self) -> str:
        """Return a line with the position, the speed and the time that is left."""
        where, settings = self.position, self._stage.settings
        pace, left = self._pace.mean(where.phase), self._pace.left(self._pieces_left())
        parts = [f"{settings['name']}: epoch {where.epoch}/{settings['epochs']}"]
        parts.append(f"{where.phase} {where.batch}")
        if where.phase == "train" and self._logs:
            parts += [f"{name} {float(value):.4g}" for name, value in sorted(self._logs.items())]
        if pace:
            parts.append(f"{1 / pace:.3g} batches/s")
        if left is not None:
            parts.append(f"{left / 60:.1f} min left")
        return ", ".join(parts)

    @property
    def _checkpoint(self) -> pathlib.Path:
        return self._output / "checkpoint.npz"

    @property
    def _stage(self) -> Stage:
        return self._stages[self.position.stage]

    @functools.cache  # noqa: B019  an arm lives as long as the process
    def _images(self, part: str) -> Images:
        return Images(self._data, part)

    def _begin(self) -> None:
        """Start a stage with its own state, except for the inherited variables."""
        stage = self._stage
        state = stage.fresh
        if self._network:
            inherited = _of_roles(stage.settings["inherits"], stage.bundle.variables)
            state = state | {name: self._network[name] for name in inherited}
        self._state, self._network, self._best = _on_device(state), {}, {}
        if "begin" in stage.bundle:
            stage.program("begin")(self._state)
        self.position.epoch, self.position.best = 0, None
        self._enter_epoch()

    def _enter_epoch(self) -> None:
        # As in Keras, metrics are means over an epoch.
        self._state |= _on_device(_of_roles(["metrics"], self._stage.fresh))
        self._candidate, self._logs = {}, {}
        self.position.enter("train")

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _epoch(self, stage: int, epoch: int) -> Epoch:
        settings, images = self._stages[stage].settings, self._images("train")
        size, steps = settings["batch_size"], settings["steps_per_epoch"]
        if steps * size > len(images):
            raise ValueError(
                f"stage {settings['name']!r} takes {steps} batches of {size} per epoch, but there "
                f"are only {len(images)} training images."
            )
        augmentation = settings["augmentation"] or {"pad": 0, "flip": False}
        return Epoch.drawn(len(images), (settings["seed"], stage, epoch), **augmentation)

    def _train(self) -> None:
        """Take a step; after the last one of an epoch, go on to the validation."""
        stage, where = self._stage, self.position
        epoch = self._epoch(where.stage, where.epoch)
        augmentation = stage.settings["augmentation"] or {"pad": 0}
        batch = epoch.batch(where.batch, stage.settings["batch_size"])
        x, y = self._images("train").cut(batch, pad=augmentation["pad"])
        before, self._logs = self._logs, stage.program("step")(self._state, x, y)
        # Waits for the step before, so that at most one is queued, and times are right.
        jax.block_until_ready(before)
        where.batch += 1
        if where.batch == stage.settings["steps_per_epoch"]:
            where.epoch += 1
            logs = {name: float(value) for name, value in sorted(self._logs.items())}
            if not all(math.isfinite(value) for value in logs.values()):
                raise FloatingPointError(
                    f"stage {stage.settings['name']!r} diverged in epoch {where.epoch}: {logs}."
                )
            line = {"stage": stage.settings["name"], "epoch": where.epoch, "logs": logs}
            where.lines.append(line)
            where.enter("validate")

    def _validate(self) -> None:
        """Evaluate a batch; after the last one, keep the network if it is the best so far."""
        stage, where = self._stage, self.position
        if not self._candidate:
            finish = stage.program("finish")
            copies = {name: jax.numpy.copy(self._state[name]) for name in finish.assigned}
            self._candidate = self._state | copies
            finish(self._candidate)
        if not self._evaluate("evaluate", self._candidate, "validation"):
            return
        line = where.lines[-1] | {"validation": where.counts, "seconds": where.seconds}
        where.lines[-1] = line
        attacked = where.best["validation"]["attacked"] if where.best else -1
        if where.epoch >= stage.settings["select_from"] and where.counts["attacked"] > attacked:
            where.best, self._best = line, self._kept(self._candidate)
        if where.epoch == stage.settings["epochs"]:
            self._end_stage()
        else:
            self._enter_epoch()

    def _end_stage(self) -> None:
        where, settings = self.position, self._stage.settings
        networks = {"best": self._best, "last": self._kept(self._candidate)}
        for kind, network in networks.items():
            progress.write_arrays(self._output / f"{settings['name']}-{kind}.npz", network)
        self._network = networks[settings["select"]]
        if "plain" in self._stage.bundle:
            other = self._stage.program("plain")(_on_device(self._network))
            progress.write_arrays(self._output / f"{settings['name']}-plain.npz", other)
        where.chosen.append(where.best if settings["select"] == "best" else where.lines[-1])
        self._state, self._best, self._candidate = {}, {}, {}
        if where.stage + 1 < len(self._stages):
            where.stage += 1
            where.enter("begin")
        else:
            where.enter("test")

    def _test(self) -> None:
        """Evaluate a batch of the test set, which is used for nothing else."""
        stage = self._stage
        if not self._state:
            self._state = _on_device(stage.fresh | self._network)
        name = "test" if "test" in stage.bundle else "evaluate"
        if self._evaluate(name, self._state, "test"):
            self._state = {}
            self.position.phase = "done"

    def _evaluate(self, program: str, state: State, part: str) -> bool:
        """Count the correct examples in the next batch; return whether it was the last one."""
        settings, where, images = self._stage.settings, self.position, self._images(part)
        size = settings["evaluation_batch_size"]
        batch = Epoch.plain(len(images)).batch(where.batch, size)
        seed = np.array([settings["evaluation_seed"], where.batch], np.int32)
        counts = np.arange(size) < len(batch.order)
        x, y = images.cut(batch.filled(size))
        found = self._stage.program(program)(state, x, y, counts, seed) | {"examples": counts.sum()}
        for name, count in found.items():
            where.counts[name] = where.counts.get(name, 0) + int(count)
        where.batch += 1
        return where.batch * size >= len(images)

    def _kept(self, state: State) -> State:
        """Return copies of the variables of the network, and of what the next stage inherits."""
        following = self._stages[self.position.stage + 1 : self.position.stage + 2]
        inherited = [role for stage in following for role in stage.settings["inherits"]]
        # Copies, as an array of JAX may share the memory that the next step writes to.
        return {n: np.array(v) for n, v in _of_roles({*_NETWORK, *inherited}, state).items()}

    def _pieces_left(self) -> dict[str, int]:
        """Return the number of batches that are left in each phase."""
        where = self.position
        left = {"train": 0, "validate": 0, "test": 0}
        for index, stage in enumerate(self._stages[where.stage :]):
            settings = stage.settings
            epochs = settings["epochs"] - (0 if index else where.epoch)
            size = settings["evaluation_batch_size"]
            left["train"] += epochs * settings["steps_per_epoch"]
            left["validate"] += epochs * math.ceil(len(self._images("validation")) / size)
        count = json.loads((self._data / "data.json").read_text())["examples"]["test"]
        left["test"] = math.ceil(count / self._stages[-1].settings["evaluation_batch_size"])
        left["train"] -= where.batch if where.phase == "train" else 0
        return left


def _of_roles(roles: Iterable[str], state: State) -> State:
    """Return the variables of these roles."""
    start = tuple(f"{role}/" for role in roles)
    return {name: value for name, value in state.items() if name.startswith(start)}


def _on_device(state: State) -> State:
    # Copies, since steps write to the memory of their inputs.
    return {name: jax.numpy.array(value, copy=True) for name, value in state.items()}
