"""Export of TensorFlow functions as StableHLO programs that share one state.

The folder has a file `NAME.mlir.gz` for each program, the program that XLA compiles for TensorFlow.
`state.npz` has the current values of the variables of all programs, by name. `programs.json` has:

* "programs", by name: "sha256" of the file; "arguments" and "outputs", lists of name, shape and
  dtype; "state", the names of the variables that follow the arguments as inputs, in their order;
  "assigned", those of them that follow the outputs as results, in their order.
* "variables", by name: shape and dtype.
* "same", by name: the variable with the same value whose name `state.npz` uses for both.

`runner/programs.py` runs them.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.accelerator import names
from tscnc_tf import _files

_ALIAS = re.compile(
    r"parameter_number = (?P<input>\d+) : i64\}, output_index = array<i64(?:: (?P<output>\d+))?>"
)
_MAIN = re.compile(
    r"func\.func (?:public )?@main\((?P<inputs>.*?)\)(?: -> (?P<results>[^{]*))? \{", re.S
)
# `loc(...)` contains quoted names, with any characters, and nested locations in brackets.
_LOCATION = re.compile(
    r""" loc\((?:[^()"]|"[^"]*"|\((?:[^()"]|"[^"]*")*\))*\)|^#loc.*\n""", re.MULTILINE
)
_FUNCTION = re.compile(r"func\.func private (@[\w.$-]+)")
_SYMBOL = re.compile(r"@[\w.$-]+")
# An operation of XLA that StableHLO does not need.
_COPY = re.compile(r"mhlo\.copy (%\S+) : (tensor<.*?>)(?=\s)")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to export.

    Attributes:
        function: takes tensors and returns None, a tensor, or a flat dict or sequence of tensors.
            All else that it reads or changes must be in variables. It is compiled here, by XLA and
            without AutoGraph, unless it already is a `tf.function` with `jit_compile=True`.
        arguments: the specs of its arguments, by name.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, tf.TensorSpec] = dataclasses.field(default_factory=dict)


def export(
    programs: Mapping[str, Program],
    folder: pathlib.Path,
    named: Callable[[], Mapping[str, tf.Variable]] = dict,
    *,
    omitted: Sequence[str] = (),
) -> dict[str, Any]:
    """Write programs and their shared state into a folder; return the content of `programs.json`.

    Args:
        programs: the programs by name.
        folder: the folder to write to, which exists.
        named: returns variables by name, as `trainer_variables` does. It is called after all
            functions have been traced, since Keras makes some variables only then. Variables that
            it lacks get names in the order of appearance.
        omitted: roles whose values are not written, since they come from elsewhere.

    Raises:
        ValueError: a program draws random numbers that don't follow from its state and arguments,
            holds as a constant what follows from a variable, or its inputs and outputs are not the
            arguments, variables and results of its function.
    """
    traced = {name: _Traced.of(name, program) for name, program in programs.items()}
    known = names.with_others(named(), [v for t in traced.values() for v in t.state])
    by_handle = {id(variable.handle): name for name, variable in known.items()}
    plans = {}
    for name, program in traced.items():
        # Compressed, since constants such as identity matrices are written out in full.
        packed = gzip.compress(program.text.encode(), mtime=0)
        (folder / f"{name}.mlir.gz").write_bytes(packed)
        state = [by_handle[id(variable.handle)] for variable in program.state]
        plans[name] = {
            "sha256": hashlib.sha256(packed).hexdigest(),
            "arguments": _described(programs[name].arguments),
            "outputs": _described(program.outputs),
            "state": state,
            "assigned": [state[index] for index in program.assigned],
        }
    used = {name for plan in plans.values() for name in plan["state"]}
    values = {name: variable.numpy() for name, variable in known.items() if name in used}
    start = tuple(f"{role}/" for role in omitted)
    kept: dict[tuple[Any, ...], str] = {}
    sources = {
        name: kept.setdefault((value.dtype, value.shape, value.tobytes()), name)
        for name, value in values.items()
        if not name.startswith(start)
    }
    np.savez_compressed(folder / "state.npz", **{name: values[name] for name in kept.values()})
    plan = {
        "programs": plans,
        "variables": {
            name: {"shape": list(value.shape), "dtype": value.dtype.name}
            for name, value in values.items()
        },
        "same": {name: source for name, source in sources.items() if source != name},
    }
    _files.write_text(folder / "programs.json", json.dumps(plan, indent=1) + "\n")
    return plan


@dataclasses.dataclass(frozen=True)
class _Traced:
    """A compiled function: its text, its variables, which of them it assigns, and its results."""

    text: str
    state: Sequence[tf.Variable]
    assigned: Sequence[int]
    outputs: Mapping[str, tf.TensorSpec]

    @classmethod
    def of(cls, name: str, program: Program) -> _Traced:
        function = program.function
        if not hasattr(function, "experimental_get_compiler_ir"):
            function = tf.function(function, jit_compile=True, autograph=False)
        arguments = [tf.zeros(spec.shape, spec.dtype) for spec in program.arguments.values()]
        graph = function.get_concrete_function(*arguments)
        variables = {id(variable.handle): variable for variable in graph.variables}
        state = [
            variables[id(tensor)] if id(tensor) in variables else _constant(name, tensor)
            for tensor in graph.captured_inputs
        ]
        outputs = _outputs(graph.structured_outputs)
        lower = functools.partial(
            function.experimental_get_compiler_ir(*arguments), stage="stablehlo"
        )
        text = lower()
        aliases = {int(m["output"] or 0): int(m["input"]) for m in _ALIAS.finditer(text)}
        found = _MAIN.search(text)
        counts = {
            "inputs": (len(arguments) + len(state), found["inputs"].count("tensor<")),
            "results": (len(outputs) + len(aliases), (found["results"] or "").count("tensor<")),
        }
        for what, (known, count) in counts.items():
            if known != count:
                raise ValueError(f"program {name!r} has {count} {what}, but {known} are known.")
        if sorted(aliases) != list(range(len(outputs), len(outputs) + len(aliases))):
            raise ValueError(f"program {name!r} assigns variables in unknown places: {aliases}.")
        main = text[found.start() :].partition("\n  func.func ")[0]
        used = {int(number) for number in re.findall(r"%arg(\d+)(?!\d|:)", main)}
        unused = [v for i, v in enumerate(state, start=len(arguments)) if i not in used]
        _require_no_values(name, lower, text, unused)
        assigned = [aliases[index] - len(arguments) for index in sorted(aliases)]
        return cls(_portable(name, text), state, assigned, outputs)


def _require_no_values(
    name: str, lower: Callable[[], str], text: str, unused: Sequence[tf.Variable]
) -> None:
    """Raise if a program holds current values of variables as constants.

    XLA makes constants of what it must know at compile time: a shape, or an index of a slice.

    Args:
        name: the name of the program.
        lower: a function that compiles the program again and returns its text.
        text: the text of the program.
        unused: the inputs that the program does not read. Most are only written.
    """

    def follows_from(variables: Sequence[tf.Variable]) -> bool:
        """Tell whether the program changes with the values of the variables."""
        values = [variable.numpy() for variable in variables]
        try:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(~value if value.dtype == bool else value + np.ones_like(value))
            return _portable(name, lower()) != _portable(name, text)
        finally:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    if unused and follows_from(unused):
        found = [each.name for each in unused if follows_from([each])]
        raise ValueError(
            f"program {name!r} holds as a constant what follows from the values of "
            f"{found or [each.name for each in unused]}: XLA must know it at compile time. Use "
            "tf.gather instead of a slice whose indices depend on a variable."
        )


def _constant(name: str, tensor: tf.Tensor) -> tf.Variable:
    """Return a variable for a captured tensor, such as the mean in a Normalization layer."""
    if tensor.dtype in (tf.resource, tf.variant):
        raise ValueError(
            f"program {name!r} uses {tensor!r}, which is neither an argument nor a variable nor an "
            "array of numbers."
        )
    return tf.Variable(tensor, trainable=False, name="constant")


def _outputs(structure: Any) -> dict[str, tf.TensorSpec]:
    """Return the specs of a function's outputs, in the order of the program's results."""
    if structure is None:
        return {}
    if isinstance(structure, Mapping):
        return {key: tf.TensorSpec.from_tensor(structure[key]) for key in sorted(structure)}
    return {
        str(index): tf.TensorSpec.from_tensor(value)
        for index, value in enumerate(tf.nest.flatten(structure))
        if value is not None
    }


def _portable(name: str, text: str) -> str:
    """Return a program in StableHLO only, without locations in the source code.

    Names that TensorFlow numbers are replaced, so that equal programs have equal texts, and JAX
    finds them in its cache.
    """
    if re.search(r"= stablehlo\.rng ", text):
        raise ValueError(
            f"program {name!r} draws random numbers that don't follow from its state: a run could "
            "not be repeated. Layers such as tf_keras' Dropout do that. Use Keras 3, which has the "
            "state of its generators in variables, or `tf.random.stateless_uniform`."
        )
    text = _COPY.sub(r"stablehlo.reshape \1 : (\2) -> \2", _LOCATION.sub("", text))
    text = re.sub(r"^module @\S+", "module @program", text, count=1, flags=re.MULTILINE)
    functions = {old: f"@function_{i}" for i, old in enumerate(_FUNCTION.findall(text))}
    text = _SYMBOL.sub(lambda found: functions.get(found[0], found[0]), text)
    foreign = sorted(set(re.findall(r'= "?(mhlo\.\w+)', text)))
    if foreign:
        raise ValueError(f"program {name!r} has operations that are not StableHLO's: {foreign}.")
    return text


def _described(specs: Mapping[str, tf.TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": spec.shape.as_list(), "dtype": spec.dtype.name}
        for name, spec in specs.items()
    ]
