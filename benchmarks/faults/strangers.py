"""Files from strangers: code in models and recipes, archives that unpack to too much, links."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Iterator

from benchmarks.faults.outcome import Outcome

ROOT = pathlib.Path(__file__).resolve().parents[2]
MARKER = "strangers"


def scenarios(smoke: bool) -> Iterator[Outcome]:
    """Yield the outcomes of the tests with this marker, by the kind of file."""
    chosen = ["tests/test_datasets_sources.py"] if smoke else []
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", MARKER, f"--junitxml={report}"]
        done = subprocess.run(
            [*command, *chosen], cwd=ROOT, check=False, capture_output=True, text=True
        )
        if done.returncode not in (0, 1):  # 1: some tests have failed
            raise RuntimeError(f"pytest has failed:\n{done.stdout}{done.stderr}")
        yield from outcomes(report.read_text(encoding="utf-8"))


def outcomes(report: str) -> list[Outcome]:
    """Return the outcomes in a report of pytest in JUnit's format, by the module of the tests."""
    found: dict[str, Outcome] = {}
    for case in xml.etree.ElementTree.fromstring(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        module, name = case.get("classname", "").rpartition(".")[2], case.get("name", "")
        what = module.removeprefix("test_").replace("_", " ")
        outcome = found.setdefault(module, Outcome(f"files from strangers ({what})"))
        if case.find("failure") is None and case.find("error") is None:
            outcome.count("refused, or read without harm, as the test demands")
        else:
            outcome.lose(f"{module}::{name}")
    return list(found.values())
