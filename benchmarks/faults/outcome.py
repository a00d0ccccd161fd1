"""What became of a kind of fault."""

from __future__ import annotations

import collections
import dataclasses

from tscnc_tf import _reports


@dataclasses.dataclass
class Outcome(_reports.Record):
    """A kind of fault: how often it was tried, how these ended, and what was lost.

    Attributes:
        fault: what went wrong.
        tried: how often.
        ends: how often it ended in which way, if nothing was lost.
        lost: what was lost, or not said, a line for each case.
    """

    fault: str
    tried: int = 0
    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    lost: list[str] = dataclasses.field(default_factory=list)

    def count(self, end: str) -> None:
        """Take note of a case that ended well, and how."""
        self.tried += 1
        self.ends[end] += 1

    def lose(self, case: str) -> None:
        """Take note of a case in which something was lost."""
        self.tried += 1
        self.lost.append(case)
