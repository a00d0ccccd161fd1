"""What was measured, as frozen dataclasses, and what it says in words."""

from __future__ import annotations

import dataclasses
from typing import Any

from tscnc_tf import _reports
from tscnc_tf._timing import Times
from tscnc_tf.inspection.speed.structure import KernelStructure

ABOUT = 1.1  # two medians within this ratio, and with overlapping quartiles, are about the same
NO_FASTER = "no faster: dense kernels multiply zeros at the same speed"
WHAT_HELPS = (
    "What does help: tscnc.pruning.compact takes dead filters out, which leaves smaller dense "
    "kernels; a runtime that knows the pattern gains by 2:4 (NVIDIA's sparse tensor cores) or by "
    "blocks (LiteRT). Zeros without a pattern save bytes, not time: tscnc.inspection.sizes."
)


@dataclasses.dataclass(frozen=True)
class LayerSpeed:
    """The times of one kernel's layer; all of them contain a call of a compiled function.

    Attributes:
        name: the layer's name, and which of its kernels, where there are several.
        kind: the layer's class.
        shape: of the kernel.
        sparsity: the fraction of zeros in it.
        input_shape: what the layer was timed on; None if it could not be called by itself.
        structure: where the zeros are.
        call: an empty compiled function: what TensorFlow takes for no computation at all.
        as_is: the layer with its zeros.
        filled: the layer with random weights that are not zero.
        sparse: the same outputs from a sparse kernel; None if there is an obstacle.
        sparse_operation: the operation that multiplied, the fastest of those tried.
        obstacle: why there are no times, or no sparse ones.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    input_shape: tuple[int, ...] | None
    structure: KernelStructure
    call: Times | None = None
    as_is: Times | None = None
    filled: Times | None = None
    sparse: Times | None = None
    sparse_operation: str = ""
    obstacle: str = ""

    @property
    def zeros_ratio(self) -> float | None:
        """The median with zeros over that without: 1 where zeros change nothing."""
        return _ratio(self.as_is, self.filled)

    @property
    def sparse_ratio(self) -> float | None:
        """The median of the sparse product over that of the layer: above 1, sparse is slower."""
        return _ratio(self.sparse, self.as_is)

    @property
    def verdict(self) -> str:
        """What the figures say, in words."""
        if self.as_is is None or self.filled is None:
            return f"not timed: {self.obstacle}"
        zeros = _zeros_verdict(self.as_is, self.filled) if self.sparsity else "it has no zeros"
        return f"{zeros}; {self._sparse_verdict}"

    @property
    def _sparse_verdict(self) -> str:
        if self.sparse is None or self.as_is is None:
            return self.obstacle
        both = max(self.sparse.median, self.as_is.median)
        if self.call is not None and both < 2 * self.call.median:
            return "too small to tell whether sparse would be faster: most of it is the call"
        zeros = f"at {100 * self.sparsity:.4g} % zeros"
        compared = _compared(self.sparse, self.as_is)
        if not self.sparse.overlaps(self.as_is):
            return f"sparse would be {compared} here {zeros}"
        if 1 / ABOUT < self.sparse.median / self.as_is.median < ABOUT:
            return f"sparse would be about as fast here {zeros}"
        return f"too unsteady to tell: by the medians sparse would be {compared} here {zeros}"

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        ratios = {"zeros_ratio": self.zeros_ratio, "sparse_ratio": self.sparse_ratio}
        return _reports.jsonable(dataclasses.asdict(self) | ratios | {"verdict": self.verdict})


@dataclasses.dataclass(frozen=True)
class SpeedReport(_reports.Report):
    """The times of a model and of its layers; `print` it for a table.

    Attributes:
        rows: one per kernel, in the model's order.
        as_is: the whole model with its zeros.
        filled: the whole model with random weights that are not zero.
        device: what computed, as TensorFlow names it.
        batch_size: the number of examples in each call.
        rounds: how often each time was taken.
        seed: of the inputs, and of the random weights.
    """

    rows: tuple[LayerSpeed, ...]
    as_is: Times
    filled: Times
    device: str
    batch_size: int
    rounds: int
    seed: int

    @property
    def zeros_ratio(self) -> float:
        """The model's median with zeros over that without: 1 where zeros change nothing."""
        return self.as_is.median / self.filled.median

    @property
    def verdict(self) -> str:
        """What the figures of the whole model say, in words."""
        return _zeros_verdict(self.as_is, self.filled)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; times are seconds."""
        derived = {"zeros_ratio": self.zeros_ratio, "verdict": self.verdict}
        figures = dataclasses.asdict(self) | derived
        return _reports.jsonable(figures | {"rows": [row.to_dict() for row in self.rows]})

    def _table(self) -> _reports.Table:
        columns = ("kernel", "layer", "zeros", "as it is", "no zeros", "sparse", "sparse/as is")
        patterns = ("dead filters", "dead inputs", "2:4", "4×4", "1×16", "16×1")
        rows = [
            (
                row.name,
                row.kind,
                _reports.percent(row.sparsity),
                *(_milliseconds(times) for times in (row.as_is, row.filled, row.sparse)),
                "–" if row.sparse_ratio is None else f"{row.sparse_ratio:.2f}",
                f"{row.structure.dead_filters}/{row.structure.filters}",
                f"{row.structure.dead_inputs}/{row.structure.inputs}",
                *(
                    "–" if share is None else f"{100 * share:.0f} %"
                    for share in row.structure.shares
                ),
            )
            for row in self.rows
        ]
        times = (_milliseconds(self.as_is), _milliseconds(self.filled))
        return _reports.Table(
            f"Milliseconds per batch of {self.batch_size} on {self.device}, medians of "
            f"{self.rounds} rounds; and the patterns of the zeros",
            (*columns, *patterns),
            rows,
            ("whole model", "", "", *times, *[""] * 8),
            [
                *(f"{row.name}: {row.verdict}." for row in self.rows),
                *(
                    f"{r.name}: {', '.join(r.structure.words)}."
                    for r in self.rows
                    if r.structure.words
                ),
                f"Whole model, with zeros {self.as_is}, without {self.filled}: {self.verdict}.",
                WHAT_HELPS,
            ],
        )


def _ratio(above: Times | None, below: Times | None) -> float | None:
    return None if above is None or below is None else above.median / below.median


def _compared(one: Times, other: Times) -> str:
    ratio = one.median / other.median
    return f"{ratio:.2g}x slower" if ratio >= 1 else f"{1 / ratio:.2g}x faster"


def _zeros_verdict(as_is: Times, filled: Times) -> str:
    if as_is.median < filled.median and not as_is.overlaps(filled):
        return f"{_compared(as_is, filled)} than without zeros"
    return NO_FASTER


def _milliseconds(times: Times | None) -> str:
    return "–" if times is None else f"{1e3 * times.median:.3g}"
