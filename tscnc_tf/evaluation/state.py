"""The state of an evaluation in a file, from which an interrupted evaluation is resumed."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from tscnc_tf import _files, _keras, _reports
from tscnc_tf._reports import jsonable
from tscnc_tf.evaluation.report import EnsemblePart

_FORMAT = 2
# The number of examples whose logits identify a model, and the relative tolerance.
_PROBED, _TOLERANCE = 16, 1e-3
_SECONDS_BETWEEN_WRITES = 1.0
_MASKS = ("correct", "before", "tied")


@dataclasses.dataclass
class AttackProgress:
    """The progress of an attack.

    Attributes:
        correct: per example, whether the model is right so far.
        before: `correct` at the beginning of the current part.
        tied: per example, whether its largest logits were equal under an attack so far.
        part: the number of parts of an ensemble that are done; 1 for an attack that is done.
        batch: the number of batches of the current part that are done.
        farthest: the largest perturbation so far, by norm.
        seconds: the time spent so far.
        part_seconds: that of the current part.
        stages: the results of the parts that are done.
    """

    correct: np.ndarray
    before: np.ndarray
    tied: np.ndarray
    part: int = 0
    batch: int = 0
    farthest: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    part_seconds: float = 0.0
    stages: list[EnsemblePart] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {name: _text(values[name]) for name in _MASKS}
        values["stages"] = [stage.to_dict() for stage in self.stages]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AttackProgress:
        """Build an object from what `to_dict` returned."""
        arrays = {name: _mask(values[name]) for name in _MASKS}
        stages = [EnsemblePart(**stage) for stage in values["stages"]]
        return cls(**{**values, **arrays, "stages": stages})


class EvaluationState:
    """The progress of all attacks, written to a file if a path is given.

    Args:
        path: of the file, which need not exist; None for no file.
        identity: JSON values that must equal those in the file for an evaluation to be resumed.
        logits: the clean logits, `(examples, classes)`; those of the first examples must be close
            to those in the file. None for a model whose logits are random.

    Raises:
        ValueError: the file is of another evaluation, or not a state file.
    """

    def __init__(self, path: Any, identity: Mapping[str, Any], logits: np.ndarray | None) -> None:
        self._path = None if path is None else _files.absolute("state_path", path)
        self._identity = json.loads(json.dumps(jsonable(identity)))
        self._logits = np.zeros((0, 0)) if logits is None else logits[:_PROBED].astype(float)
        self._attacks: dict[str, AttackProgress] = {}
        self._written = 0.0
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def of(self, name: str, correct: np.ndarray) -> AttackProgress:
        """Return the progress of an attack by its name; `correct` is its initial value."""
        return self._attacks.setdefault(
            name, AttackProgress(correct.copy(), correct.copy(), np.zeros_like(correct))
        )

    def save(self, *, now: bool = False) -> None:
        """Write the file, unless it was written less than a second ago.

        Args:
            now: whether to write it in any case.
        """
        if self._path is None:
            return
        if not now and time.monotonic() - self._written < _SECONDS_BETWEEN_WRITES:
            return
        content = {
            "format": _FORMAT,
            "identity": self._identity,
            "logits": self._logits.tolist(),
            "attacks": {name: each.to_dict() for name, each in self._attacks.items()},
        }
        _files.write_text(self._path, json.dumps(content) + "\n")
        self._written = time.monotonic()

    def _read(self, path: pathlib.Path) -> None:
        way_out = "Use the same model, data and settings, or remove the file to start again."
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, version = content["identity"], content["format"]
            logits = np.asarray(content["logits"], float)
            attacks = {
                name: AttackProgress.from_dict(each)
                for name, each in content["attacks"].items()
                if version == _FORMAT
            }
        except (OSError, UnicodeDecodeError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"state_path={str(path)!r} is not the state of an evaluation ({error}): remove the "
                "file, or choose another path."
            ) from error
        entries = {**self._identity, **found}  # of both, in order
        other = [name for name in entries if found.get(name) != self._identity.get(name)]
        if version != _FORMAT:
            other.append("format")
        if other:
            names = ", ".join(
                f"{name} (was {_short(found.get(name))}, is {_short(self._identity.get(name))})"
                for name in other
            )
            raise ValueError(
                f"state_path={str(path)!r} is of another evaluation; what differs: {names}. "
                f"{way_out}"
            )
        size = np.max(np.abs(self._logits), initial=0.0)
        is_known = logits.size == self._logits.size
        if not (is_known and np.allclose(logits, self._logits, rtol=0.0, atol=_TOLERANCE * size)):
            raise ValueError(
                f"state_path={str(path)!r} is of another model: its logits on the first examples "
                f"differ. {way_out}"
            )
        self._attacks = attacks


def digests(model: Any, x: np.ndarray, y: np.ndarray) -> dict[str, str]:
    """Return SHA-256 of the data, and of a model's weights if they can be read."""
    found = {"data": _reports.digest([("x", x), ("y", y)])}
    weights = digest_of_weights(model)
    return found | {"weights": weights} if weights else found


def digest_of_weights(model: Any) -> str:
    """Return SHA-256 of a model's weights or of its file, "" if there are none to be read."""
    if isinstance(digest := getattr(model, "digest", None), str):  # an exported model
        return digest
    if _keras.flavour(model) is not None:
        weights = model.get_weights()
    else:
        weights = [np.asarray(each) for each in getattr(model, "variables", None) or ()]
    named = ((str(index), weight) for index, weight in enumerate(weights))
    return _reports.digest(named) if weights else ""


def _text(mask: np.ndarray) -> str:
    return "".join("1" if entry else "0" for entry in mask)


def _mask(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8) == ord("1")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
