"""Programs of `benchmarks.accelerator`, compiled and run by JAX."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.extend.mlir.dialects import stablehlo

jax.config.update("jax_enable_x64", True)  # counters of steps have 64 bits


State = dict[str, Any]


class Bundle:
    """The programs of a folder, and their initial state.

    Args:
        folder: the folder of `export`, or of a stage.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._plan = json.loads((folder / "programs.json").read_text())
        self.variables: dict[str, dict[str, Any]] = self._plan["variables"]

    def __contains__(self, name: str) -> bool:
        return name in self._plan["programs"]

    def initial(self) -> dict[str, np.ndarray]:
        """Return the exported state, without variables that come from another stage."""
        sources = {name: self._plan["same"].get(name, name) for name in self.variables}
        with np.load(self._folder / "state.npz") as held:
            return {
                name: typed(held[source], self.variables[name]["dtype"])
                for name, source in sources.items()
                if source in held
            }

    def program(self, name: str) -> Program:
        """Return a program, which is compiled in its first call.

        Raises:
            ValueError: its file is not the one that was exported.
        """
        path, plan = self._folder / f"{name}.mlir.gz", self._plan["programs"][name]
        packed = path.read_bytes()
        if hashlib.sha256(packed).hexdigest() != plan["sha256"]:
            raise ValueError(f"{path} is not the file that was exported.")
        return Program(gzip.decompress(packed).decode(), plan, self.variables)


class Program:
    """A program: a function of the state and its arguments, which returns results by name.

    A call replaces the assigned variables in the state. Their old arrays are donated to JAX, and
    can't be used afterwards.

    Args:
        text: the program in StableHLO.
        plan: the entry of the program in `programs.json`.
        variables: shapes and dtypes of the variables, from `programs.json`.
    """

    def __init__(self, text: str, plan: dict[str, Any], variables: Mapping[str, Any]) -> None:
        self.arguments = {each["name"]: each for each in plan["arguments"]}
        self._outputs = [each["name"] for each in plan["outputs"]]
        self.assigned = plan["assigned"]
        self._read = [name for name in plan["state"] if name not in set(self.assigned)]
        inputs = [*plan["arguments"], *(variables[name] for name in plan["state"])]
        results = [*plan["outputs"], *(variables[name] for name in self.assigned)]
        call = _callable(text, inputs, results)
        order = plan["state"]

        def take(assigned: list[Any], read: list[Any], arguments: tuple[Any, ...]) -> Any:
            state = dict(zip(self.assigned, assigned, strict=True))
            state |= zip(self._read, read, strict=True)
            returned = call(*arguments, *(state[name] for name in order))
            return returned[: len(self._outputs)], returned[len(self._outputs) :]

        self._call = jax.jit(take, donate_argnums=0)

    def __call__(self, state: State, *arguments: Any) -> dict[str, Any]:
        """Run the program once, asynchronously."""
        assigned = [state[name] for name in self.assigned]
        read = [state[name] for name in self._read]
        outputs, assigned = self._call(assigned, read, arguments)
        state.update(zip(self.assigned, assigned, strict=True))
        return dict(zip(self._outputs, outputs, strict=True))


def typed(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return an array of an `.npz` file in its dtype, as such files store bfloat16 as bytes."""
    return array.view(np.dtype(dtype)) if array.dtype.kind == "V" else array


def _callable(text: str, inputs: Sequence[Any], results: Sequence[Any]) -> Any:
    """Return a JAX function that runs a program.

    JAX only calls programs that JAX has exported. So a function with the same inputs and outputs is
    exported, and its program is replaced.
    """
    specs = [jax.ShapeDtypeStruct(each["shape"], np.dtype(each["dtype"])) for each in inputs]

    def form(*_: Any) -> list[jax.Array]:
        return [jax.numpy.zeros(each["shape"], np.dtype(each["dtype"])) for each in results]

    exported = export.export(jax.jit(form, keep_unused=True))(*specs)
    artifact = stablehlo.serialize_portable_artifact_str(text, stablehlo.get_current_version())
    return dataclasses.replace(exported, mlir_module_serialized=artifact).call
