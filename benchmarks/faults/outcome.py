"""The outcomes of a kind of fault."""

from __future__ import annotations

import collections
import dataclasses

from tscnc_tf import _reports


@dataclasses.dataclass
class Outcome(_reports.Record):
    """The cases of a kind of fault.

    Attributes:
        fault: the kind of fault.
        tried: the number of cases.
        ends: the number of cases that ended well, by the way in which they ended.
        lost: a line for each other case.
    """

    fault: str
    tried: int = 0
    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    lost: list[str] = dataclasses.field(default_factory=list)

    def count(self, end: str) -> None:
        """Count a case that ended well, by its end."""
        self.tried += 1
        self.ends[end] += 1

    def lose(self, case: str) -> None:
        """Record a case that ended wrongly."""
        self.tried += 1
        self.lost.append(case)
