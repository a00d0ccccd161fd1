"""Function calls, run one after the other in this process or as tasks of Ray."""

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
_PATIENCE = 60.0  # seconds to wait for cancelled tasks
_CALLS = 10  # of a process of Ray: TensorFlow does not free all memory of a training


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A function call to be run.

    Attributes:
        function: the function; on Ray it is called in another process.
        arguments: its arguments.
        after: a call to run first, whose result is appended to the arguments. It runs once for all
            calls that refer to it. If it fails, they fail with the same error.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    after: Call | None = None


def require(engine: str, cpus: int, gpus: float) -> tuple[int, float]:
    """Check that an engine is available and supports the cores and GPUs, and return these.

    Raises:
        TypeError, ValueError: there is no such engine, or it does not support cpus or gpus.
        ImportError: the engine is not installed.
    """
    cpus = _checks.integer("cpus", cpus, minimum=1)
    gpus = _checks.number("gpus", gpus, minimum=0.0)
    if _checks.one_of("engine", engine, ENGINES) == "ray":
        _ray()
    elif (cpus, gpus) != (1, 0.0):
        raise ValueError(
            f"cpus and gpus are for engine='ray', got {cpus} and {gpus:g} with {engine!r}, which "
            "uses what is available: leave them out."
        )
    return cpus, gpus


def run(
    calls: Mapping[str, Call], engine: str, *, cpus: int = 1, gpus: float = 0.0
) -> Generator[tuple[str, str]]:
    """Run calls; yield the name of each as it ends, and its error message, empty if there is none.

    On Ray, SIGTERM acts like Ctrl-C during the run: the tasks are cancelled, and KeyboardInterrupt
    is raised. (Ray's own handler would end the cluster and this process at once.) Closing the
    generator also cancels the tasks.

    Args:
        calls: by name.
        engine: "process": in their order, in this process, whose memory grows, since TensorFlow
            does not free all of what a training has used (some 20 MiB of each stage of an
            experiment). "ray": as tasks, on the cluster that Ray is connected to or finds, else on
            this machine; a process of Ray ends after some calls. A task whose worker dies is
            started again, up to three times.
        cpus: cores of each task.
        gpus: GPUs of each task.

    Raises:
        ValueError: no machine has so many cores and GPUs.
        OSError: a call failed with a disk error, which would affect the others as well.
    """
    return _in_turn(calls) if engine == "process" else _on_ray(calls, cpus, gpus)


def _in_turn(calls: Mapping[str, Call]) -> Generator[tuple[str, str]]:
    done: dict[Call, tuple[Any, str]] = {}  # results and errors of `after` calls
    for name, call in calls.items():
        if call.after is None:
            yield name, _outcome(call)[1]
            continue
        if call.after not in done:
            done[call.after] = _outcome(call.after)
        result, error = done[call.after]
        yield name, error or _outcome(call, result)[1]


def _outcome(call: Call, *more: Any) -> tuple[Any, str]:
    """Run a call; return its result and its error message, one of them empty."""
    try:
        return call.function(*call.arguments, *more), ""
    except Exception as error:  # any error of the call is reported
        return None, _error_text(error)


def _error_text(error: BaseException) -> str:
    """Return the error of a call as text.

    Raises:
        OSError: it is a disk error.
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
    """Raise a ValueError if no machine has what a task needs, since Ray would wait for one."""
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
    if 0.0 < gpus < 1.0:  # otherwise TensorFlow takes all memory of the GPU
        settings["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"
    task = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        runtime_env={"env_vars": settings},
        max_retries=3,
        max_calls=1 if gpus else _CALLS,
    )(_in_folder)

    def submitted(call: Call, *more: Any) -> Any:
        return task.remote(str(pathlib.Path.cwd()), call.function, *call.arguments, *more)

    first: dict[Call, Any] = {}
    running: dict[Any, str] = {}
    for name, call in calls.items():
        if call.after is None:
            running[submitted(call)] = name
            continue
        if call.after not in first:
            first[call.after] = submitted(call.after)
        running[submitted(call, first[call.after])] = name
    try:
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                yield name, _error_text(getattr(error, "cause", None) or error)
            else:
                yield name, ""
    finally:
        left = [*first.values(), *running]
        for each in left:
            ray.cancel(each)
        if left:  # cancelled tasks write their state before they end
            ray.wait(left, num_returns=len(left), timeout=_PATIENCE)


def _in_folder(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a working directory, to which relative paths refer.

    Of several interrupts only the first counts: Ray may repeat that of a cancelled task, which
    would then not write its state.
    """

    def once(_signal: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    os.chdir(folder)
    before = signal.signal(signal.SIGINT, once)
    try:
        return function(*arguments)
    finally:
        signal.signal(signal.SIGINT, before)
