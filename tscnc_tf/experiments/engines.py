"""Calls that are made one after the other in this process, or as tasks of Ray."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import threading
import types
from collections.abc import Callable, Generator, Mapping
from typing import Any

from tscnc_tf import _checks, _extras, _files

ENGINES = ("process", "ray")
_PATIENCE = 60.0  # seconds for tasks that are cancelled


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A call that is to be made.

    Attributes:
        function: what is called; on Ray in another process.
        arguments: for it.
        after: a call whose result is one argument more, the last. It is made once for all that
            come after it; where it fails, so do they, with its error.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    after: Call | None = None


def require(engine: str, cpus: int, gpus: float) -> tuple[int, float]:
    """Return cores and GPUs, if calls can be made with them by an engine.

    Raises:
        TypeError, ValueError: there is no such engine, or it does not take the cores or GPUs.
        ImportError: it is not installed.
    """
    cpus = _checks.integer("cpus", cpus, minimum=1)
    gpus = _checks.number("gpus", gpus, minimum=0.0)
    if _checks.one_of("engine", engine, ENGINES) == "ray":
        _ray()
    elif (cpus, gpus) != (1, 0.0):
        raise ValueError(
            f"cpus and gpus are for engine='ray', got {cpus} and {gpus:g} with {engine!r}, which "
            "uses what there is: leave them out."
        )
    return cpus, gpus


def run(
    calls: Mapping[str, Call], engine: str, *, cpus: int = 1, gpus: float = 0.0
) -> Generator[tuple[str, str]]:
    """Make calls; yield the name of each as it ends, and its error, empty if it has none.

    On Ray SIGTERM acts as Ctrl-C does, for as long as this goes on: tasks are asked to end, and
    KeyboardInterrupt is raised. (Ray's own handler would end the cluster, and this process with it,
    before anything else is done.) To close what is returned asks them to end, too.

    Args:
        calls: by names.
        engine: "process": in their order, in this process. "ray": as tasks, on the cluster that
            Ray is connected to or finds, else on this machine. A task whose worker dies is started
            again, up to three times.
        cpus: cores of each task.
        gpus: GPUs of each task.

    Raises:
        ValueError: no machine has so many cores and GPUs.
        OSError: a call has met an error of the disk, which the others would meet as well.
    """
    return _in_turn(calls) if engine == "process" else _on_ray(calls, cpus, gpus)


def _in_turn(calls: Mapping[str, Call]) -> Generator[tuple[str, str]]:
    done: dict[Call, tuple[Any, str]] = {}  # results and errors of the calls before others
    for name, call in calls.items():
        if call.after is None:
            yield name, _made(call)[1]
            continue
        if call.after not in done:
            done[call.after] = _made(call.after)
        result, error = done[call.after]
        yield name, error or _made(call, result)[1]


def _made(call: Call, *more: Any) -> tuple[Any, str]:
    """Make a call; return its result and its error, one of them empty."""
    try:
        return call.function(*call.arguments, *more), ""
    except Exception as error:  # of any kind: it is the call's
        return None, _said(error)


def _said(error: BaseException) -> str:
    """Return the error of a call as text.

    Raises:
        OSError: it is one of the disk.
    """
    if isinstance(error, OSError) and error.errno in _files.OF_THE_DISK:
        raise error
    return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


def _ray() -> types.ModuleType:
    return _extras.require_extra("ray", "ray")


def _on_ray(calls: Mapping[str, Call], cpus: int, gpus: float) -> Generator[tuple[str, str]]:
    if not calls:
        return
    ray = _ray()
    own = not ray.is_initialized()
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    may_handle = threading.current_thread() is threading.main_thread()
    if own:
        ray.init(logging_level="ERROR", log_to_driver=False)
    try:
        if may_handle:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        _require_resources(ray, cpus, gpus)
        yield from _as_tasks(ray, calls, cpus, gpus)
    finally:
        if own:
            ray.shutdown()
        if may_handle:
            signal.signal(signal.SIGTERM, before)


def _require_resources(ray: types.ModuleType, cpus: int, gpus: float) -> None:
    """Raise a ValueError if no machine has what a task asks for: Ray would wait for one."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(m.get("CPU", 0.0) >= cpus and m.get("GPU", 0.0) >= gpus for m in machines):
        there = "; ".join(f"{m.get('CPU', 0):g} and {m.get('GPU', 0):g}" for m in machines)
        raise ValueError(
            f"cpus and gpus must be what one machine of Ray has, got {cpus} and {gpus:g}; there "
            f"are {there}."
        )


def _as_tasks(
    ray: types.ModuleType, calls: Mapping[str, Call], cpus: int, gpus: float
) -> Generator[tuple[str, str]]:
    threads = {name: str(cpus) for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")}
    settings = {"TF_CPP_MIN_LOG_LEVEL": "3", **threads}
    if 0.0 < gpus < 1.0:  # TensorFlow would take all of its memory
        settings["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    task = ray.remote(_there).options(
        num_cpus=cpus, num_gpus=gpus, runtime_env={"env_vars": settings}, max_retries=3
    )

    def begun(call: Call, *more: Any) -> Any:
        return task.remote(str(pathlib.Path.cwd()), call.function, *call.arguments, *more)

    first: dict[Call, Any] = {}
    running: dict[Any, str] = {}
    for name, call in calls.items():
        if call.after is None:
            running[begun(call)] = name
            continue
        if call.after not in first:
            first[call.after] = begun(call.after)
        running[begun(call, first[call.after])] = name
    try:
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                yield name, _said(getattr(error, "cause", None) or error)
            else:
                yield name, ""
    finally:
        left = [*first.values(), *running]
        for each in left:
            ray.cancel(each)
        if left:  # what is cancelled writes its state first
            ray.wait(left, num_returns=len(left), timeout=_PATIENCE)


def _there(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a working directory, which relative paths begin at."""
    os.chdir(folder)
    return function(*arguments)
