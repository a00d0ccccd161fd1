"""A Ray cluster of two nodes, both on this computer, of which one dies."""

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

# Sets environment variables during a block, and restores all of them.
_environment = functools.partial(mock.patch.dict, os.environ)
_WAIT = 900.0  # timeout in seconds until two runs have begun
_ALONE = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1")


def scenarios(_smoke: bool) -> Iterator[Outcome]:
    """Yield the outcome of a sweep on two nodes, of which one is killed.

    It must end as in one process, bit for bit. Faults of a network disk, which the machines of a
    real cluster share, are not tested.
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
    """Run the sweep in another process, with as many threads as a Ray task has."""
    with _environment(_ALONE):
        process = multiprocessing.get_context("spawn").Process(
            target=_sweep, args=(folder, "process")
        )
        process.start()
        process.join()


def _plan() -> experiments.Sweep:
    return experiments.Sweep({"small": runs.recipe(True)}, seeds=[0, 1])


def _sweep(folder: pathlib.Path, engine: str) -> Mapping[str, str]:
    """Run a sweep of two seeds; return the errors of the failed runs."""
    return experiments.sweep(_plan(), folder, engine=engine, progress=False).failed


@contextlib.contextmanager
def _two_machines(folder: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Connect to a cluster of two nodes with a core each; yield a function that kills the second.

    The cluster has its own folder of temporary files, so that Ray does not connect to another
    cluster on this computer.
    """
    with _environment({"RAY_TMPDIR": str(folder)}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of Ray
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
    """Kill a node once both nodes have written the state of a run."""
    deadline = time.monotonic() + _WAIT
    busy: set[pathlib.Path] = set()
    while len(busy) < 2:
        with contextlib.suppress(FileNotFoundError):  # complete stages remove theirs
            busy = {path.parents[1] for path in folder.rglob("state-*")}
        if time.monotonic() > deadline:
            outcome.lose("the two machines were never at work at the same time")
            return
        time.sleep(0.05)
    kill()
