"""Calls that are made one after the other in this process, or as tasks of Ray."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tscnc_tf import _checks, _extras

ENGINES = ("process", "ray")


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


def require(engine: str, cpus: int, gpus: float) -> None:
    """Raise an error unless calls can be made by an engine.

    Raises:
        ValueError: there is no such engine, or it does not take the cores or GPUs.
        ImportError: it is not installed.
    """
    _checks.one_of("engine", engine, ENGINES)
    if engine == "ray":
        _ray()
    elif (cpus, gpus) != (1, 0.0):
        raise ValueError(
            f"cpus and gpus are for engine='ray', got {cpus} and {gpus:g} with {engine!r}, which "
            "uses what there is: leave them out."
        )


def run(
    calls: Mapping[str, Call], engine: str, *, cpus: int = 1, gpus: float = 0.0
) -> Iterator[tuple[str, str]]:
    """Make calls; yield the name of each as it ends, and its error, empty if it has none.

    Args:
        calls: by names.
        engine: "process": in their order, in this process. "ray": as tasks, on the cluster that
            Ray is connected to or finds, else on this machine. A task whose worker dies is started
            again, up to three times.
        cpus: cores of each task.
        gpus: GPUs of each task.

    Raises:
        ValueError: no machine has so many cores or GPUs.
        OSError: a call has met an error of the disk, which the others would meet as well.
    """
    return _in_turn(calls) if engine == "process" else _on_ray(calls, cpus, gpus)


def _in_turn(calls: Mapping[str, Call]) -> Iterator[tuple[str, str]]:
    done: dict[Call, Any] = {}
    for name, call in calls.items():
        first = call.after
        if first is not None and first not in done:
            done[first] = _made(first, ())
        before = () if first is None else (done[first],)
        ended = next((each for each in before if isinstance(each, Exception)), None)
        ended = _made(call, before) if ended is None else ended
        yield name, _said(ended) if isinstance(ended, Exception) else ""


def _made(call: Call, more: tuple[Any, ...]) -> Any:
    """Make a call; return its result or its error."""
    try:
        return call.function(*call.arguments, *more)
    except Exception as error:  # of any kind: it is the call's
        return error


def _said(error: BaseException) -> str:
    """Return the error of a call as text.

    Raises:
        OSError: it is one of the disk.
    """
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise error
    return f"{type(error).__name__}: {error}"


def _ray() -> types.ModuleType:
    return _extras.require_extra("ray", "ray")


def _on_ray(calls: Mapping[str, Call], cpus: int, gpus: float) -> Iterator[tuple[str, str]]:
    if not calls:
        return
    ray = _ray()
    own = not ray.is_initialized()
    if own:
        ray.init(logging_level="ERROR", log_to_driver=False)
    try:
        _require_resources(ray, cpus, gpus)
        yield from _as_tasks(ray, calls, cpus, gpus)
    finally:
        if own:
            ray.shutdown()


def _require_resources(ray: types.ModuleType, cpus: int, gpus: float) -> None:
    """Raise a ValueError if no machine has what a task asks for: Ray would wait for one."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, asked, resource in (("cpus", cpus, "CPU"), ("gpus", gpus, "GPU")):
        most = max((each.get(resource, 0.0) for each in machines), default=0.0)
        if asked > most:
            raise ValueError(
                f"{name} must be <= {most:g}, what the largest machine of Ray has, got {asked:g}."
            )


def _as_tasks(
    ray: types.ModuleType, calls: Mapping[str, Call], cpus: int, gpus: float
) -> Iterator[tuple[str, str]]:
    threads = {name: str(cpus) for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")}
    environment = {"env_vars": {"TF_CPP_MIN_LOG_LEVEL": "3", **threads}}

    def begun(call: Call, *more: Any) -> Any:
        task = ray.remote(call.function).options(
            num_cpus=cpus, num_gpus=gpus, runtime_env=environment, max_retries=3
        )
        return task.remote(*call.arguments, *more)

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
        for task in running:
            ray.cancel(task)
