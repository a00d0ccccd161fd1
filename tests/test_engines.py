"""Calls in this process and as tasks; of Ray there is a stand-in here, the real one in sweeps."""

from __future__ import annotations

import gc
import pathlib
import types
import weakref

import pytest

from tscnc_tf.experiments import engines
from tscnc_tf.experiments.engines import Call


class Heavy:
    """What a call that fails has in its memory."""


def add(made, *numbers):
    made.append(numbers)
    return sum(numbers)


def fail(error):
    raise error


class BrokenError(Exception):
    def __init__(self, cause):
        super().__init__()
        self.cause = cause


class StandIn(types.SimpleNamespace):
    """As much of Ray as engines use: tasks are run when they are begun, and fail as Ray's do."""

    def __init__(self, machines=({"CPU": 2.0},)):
        super().__init__(cancelled=[], folders=[], options=[], machines=machines, waited=[])
        self.exceptions = types.SimpleNamespace(RayError=BrokenError)

    def is_initialized(self):
        return True

    def nodes(self):
        return [{"Alive": True, "Resources": machine} for machine in self.machines]

    def remote(self, **given):
        def task(function):
            self.options.append(given)
            return types.SimpleNamespace(remote=lambda *args: self._begun(function, *args))

        return task

    def _begun(self, function, *args):
        resolved = [self._result(arg) if isinstance(arg, Task) else arg for arg in args]
        self.folders.append(args[0])
        broken = next((arg for arg in resolved if isinstance(arg, Exception)), None)
        if broken is not None:
            return Task(broken)
        try:
            return Task(function(*resolved))
        except Exception as error:
            return Task(error)

    def _result(self, task):
        return task.result

    def wait(self, tasks, num_returns=1, timeout=None):
        self.waited.append((len(tasks), timeout))
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task):
        if isinstance(task.result, Exception):
            raise BrokenError(task.result)
        return task.result

    def cancel(self, task):
        self.cancelled.append(task)


class Task:
    def __init__(self, result):
        self.result = result


@pytest.fixture(params=["process", "ray"])
def engine(request, monkeypatch):
    if request.param == "ray":
        monkeypatch.setattr(engines, "_ray", StandIn)
    return request.param


def test_a_call_before_others_is_made_once_and_hands_on_its_result(engine):
    made = []
    first = Call(add, (made, 1, 2))
    calls = {"a": Call(add, (made, 10), first), "b": Call(add, (made, 20), first)}
    assert list(engines.run({**calls, "c": Call(add, (made, 5))}, engine)) == [
        (name, "") for name in "abc"
    ]
    assert sorted(made) == [(1, 2), (5,), (10, 3), (20, 3)]


def test_errors_are_those_of_their_calls(engine):
    noted = ValueError("no weights")
    noted.add_note("in stage 2")
    bad = Call(fail, (KeyError("x"),))
    calls = {
        "noted": Call(fail, (noted,)),
        "after": Call(add, ([], 1), bad),
        "too": Call(add, ([], 1), bad),
        "elsewhere": Call(fail, (PermissionError(13, "Permission denied", "data.npz"),)),
        "good": Call(add, ([], 1)),
    }
    assert dict(engines.run(calls, engine)) == {
        "noted": "ValueError: no weights\nin stage 2",
        "after": "KeyError: 'x'",
        "too": "KeyError: 'x'",
        "elsewhere": "PermissionError: [Errno 13] Permission denied: 'data.npz'",
        "good": "",
    }


def test_an_error_of_the_disk_ends_all(engine):
    made = []
    calls = {"full": Call(fail, (OSError(28, "No space left"),)), "next": Call(add, (made, 1))}
    with pytest.raises(OSError, match="No space left"):
        list(engines.run(calls, engine))
    assert engine == "ray" or not made


def test_a_returned_error_is_a_result():
    made = []
    first = Call(lambda: ValueError("a value"), ())
    assert list(
        engines.run({"a": Call(lambda value: made.append(value), (), first)}, "process")
    ) == [("a", "")]
    assert str(made[0]) == "a value"


def test_what_failed_is_let_go_of():
    alive = []

    def train():
        model = Heavy()
        alive.append(weakref.ref(model))
        raise ValueError("diverged")

    def check(*_):
        raise AssertionError

    first = Call(train, ())
    ended = engines.run({"a": Call(check, (), first), "b": Call(check, (), first)}, "process")
    assert next(ended) == ("a", "ValueError: diverged")
    gc.collect()
    assert alive[0]() is None
    assert next(ended) == ("b", "ValueError: diverged")
    assert len(alive) == 1


def test_whoever_stops_cancels_all_tasks_and_waits_for_them(monkeypatch):
    ray = StandIn()
    monkeypatch.setattr(engines, "_ray", lambda: ray)
    first = Call(add, ([], 1))
    ended = engines.run({name: Call(add, ([], 1), first) for name in "abc"}, "ray")
    next(ended)
    ended.close()
    assert len(ray.cancelled) == 3  # two of them, and the one before
    assert ray.waited[-1] == (3, engines._PATIENCE)


def test_tasks_begin_where_this_process_is_with_their_share(monkeypatch):
    ray = StandIn([{"CPU": 8.0, "GPU": 1.0}])
    monkeypatch.setattr(engines, "_ray", lambda: ray)
    list(engines.run({"a": Call(add, ([], 1))}, "ray", cpus=3, gpus=0.5))
    list(engines.run({"a": Call(add, ([], 1))}, "ray"))
    options, without_gpu = ray.options
    assert (options["num_cpus"], options["num_gpus"]) == (3, 0.5)
    # Each process of Ray ends before its memory has grown by much, and frees its GPU's.
    assert (options["max_calls"], without_gpu["max_calls"]) == (1, engines._CALLS)
    settings = options["runtime_env"]["env_vars"]
    assert settings["TF_NUM_INTRAOP_THREADS"] == "3"
    assert settings["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    assert ray.folders == 2 * [str(pathlib.Path.cwd())]


def test_one_machine_must_have_all_that_a_task_needs(monkeypatch):
    monkeypatch.setattr(engines, "_ray", lambda: StandIn([{"CPU": 64.0}, {"CPU": 4.0, "GPU": 1.0}]))
    message = "what one machine of Ray has, got 8 and 1; there are 64 and 0; 4 and 1"
    with pytest.raises(ValueError, match=message):
        list(engines.run({"a": Call(add, ([], 1))}, "ray", cpus=8, gpus=1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("dask", 1, 0.0), ValueError, "engine must be one of 'process', 'ray', got 'dask'"),
        (("process", 2, 0.0), ValueError, "cpus and gpus are for engine='ray', got 2 and 0 with"),
        (("ray", 0, 0.0), ValueError, "cpus must be >= 1, got 0"),
        (("ray", 1, -1.0), ValueError, r"gpus must be >= 0(\.0)?, got -1"),
        (("ray", 1.5, 0.0), TypeError, "cpus must be"),
    ],
)
def test_engines_that_are_not_there_are_refused(arguments, error, message, monkeypatch):
    monkeypatch.setattr(engines, "_ray", StandIn)
    with pytest.raises(error, match=message):
        engines.require(*arguments)
