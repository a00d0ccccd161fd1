"""A cluster of two machines, of which one dies: Ray's own processes for two, on this one."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pathlib
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

from benchmarks.faults import runs
from benchmarks.faults.outcome import Outcome
from tscnc_tf import experiments

# Sets variables of the environment during a block; all are as they were afterwards.
_environment = functools.partial(mock.patch.dict, os.environ)
_WAIT = 900.0  # seconds for two runs to begin
_ALONE = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1")


def scenarios(_smoke: bool) -> Iterator[Outcome]:
    """Yield what became of a sweep on two machines, of which one is killed.

    It must end as in one process, bit for bit. (A real cluster shares a disk by a network, whose
    faults are not tried.)
    """
    with tempfile.TemporaryDirectory(prefix="two-") as name:
        folder = pathlib.Path(name)
        alone, goal = folder / "alone", folder / "sweep"
        _in_one_process(alone)
        outcome = Outcome("a sweep on two machines of Ray's, one of which is killed on the way")
        with _two_machines(folder) as kill:
            killer = threading.Thread(target=_kill_when_busy, args=(goal, kill, outcome))
            killer.start()
            failed = _sweep(goal, "ray")
            killer.join()
        for run in _plan().runs():
            if run.place in failed:
                outcome.lose(f"{run.place} has failed: {failed[run.place]}")
            elif difference := runs.differences(goal / run.place, alone / run.place):
                outcome.lose(f"{run.place}: {difference}")
            else:
                outcome.count("as in one process, bit for bit")
        yield outcome


def _in_one_process(folder: pathlib.Path) -> None:
    """Run the sweep in another process, with as many threads as a task of Ray's has."""
    with _environment(_ALONE):
        process = multiprocessing.get_context("spawn").Process(
            target=_sweep, args=(folder, "process")
        )
        process.start()
        process.join()


def _plan() -> experiments.Sweep:
    return experiments.Sweep({"small": runs.recipe(True)}, seeds=[0, 1])


def _sweep(folder: pathlib.Path, engine: str) -> Mapping[str, str]:
    """Run a sweep of two seeds; return what has failed, and why."""
    return experiments.sweep(_plan(), folder, engine=engine, progress=False).failed


@contextlib.contextmanager
def _two_machines(folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Connect to a cluster of two machines with a core each; yield what kills the second.

    It has nothing to do with a cluster that runs here already, whose address may be in a file in
    Ray's folder of temporary files.
    """
    with _environment({"RAY_TMPDIR": str(folder)}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        os.environ.pop("RAY_ADDRESS", None)
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        second = cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        try:
            yield lambda: cluster.remove_node(second, allow_graceful=False)
        finally:
            ray.shutdown()
            cluster.shutdown()


def _kill_when_busy(folder: pathlib.Path, kill: Callable[[], None], outcome: Outcome) -> None:
    """Kill a machine when both have written the state of a run that they are in."""
    deadline = time.monotonic() + _WAIT
    busy: set[pathlib.Path] = set()
    while len(busy) < 2:
        with contextlib.suppress(FileNotFoundError):  # what is complete is removed meanwhile
            busy = {path.parents[1] for path in folder.rglob("state-*")}
        if time.monotonic() > deadline:
            outcome.lose("the two machines were never at work at the same time")
            return
        time.sleep(0.05)
    kill()
