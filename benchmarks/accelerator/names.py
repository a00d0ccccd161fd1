"""Unique names of variables, by which stages and trainers exchange their values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tscnc_tf._keras import masks, optimizers
from tscnc_tf._keras.flavours import tensor_variable

# The name of a variable begins with its role.
ROLES = ("model", "pruner", "optimizer", "metrics", "other")


def model_variables(model: Any) -> dict[str, Any]:
    """Return the TensorFlow variables of a network, without those of its pruner, by name.

    The names are those of `trainer_variables`.
    """
    pruning, found = masks.names(model), _Names()
    found.add("model", [variable for variable in model.variables if id(variable) not in pruning])
    return found.variables


def trainer_variables(trainer: Any) -> dict[str, Any]:
    """Return the TensorFlow variables of a compiled `AdversarialTraining` by name.

    A name is the variable's role and its path in Keras: "model/conv/kernel",
    "optimizer/sgd/conv_kernel_momentum", "metrics/loss/total". A pruner's masks are named after
    their weights: "pruner/mask/conv/kernel". If several variables have the same path, as in nested
    models whose layers have the same names, the later ones are numbered: "model/conv/kernel#2".

    Two models have the same names if they are built in the same way, and if their layers have names
    or Keras restarts its numbering of layers before each (`clear_session`).
    """
    model = trainer.model
    found, pruning = _Names(model_variables(model)), masks.names(model)
    for weight, mask in masks.masked_variables(model):
        found.add("pruner", [mask], path=f"mask/{found.path_of(weight)}")
    for pruner in masks.pruners(model):
        found.add("pruner", pruner.state.weights)
    found.add("pruner", [variable for variable in model.variables if id(variable) in pruning])
    for optimizer in (trainer.optimizer, optimizers.innermost(trainer.optimizer)):
        found.add("optimizer", optimizer.variables)
    for metric in trainer.metrics:
        for variable in metric.variables:
            found.add("metrics", [variable], path=f"{metric.name}/{_path(variable).split('/')[-1]}")
    return found.variables


def with_others(named: Mapping[str, Any], variables: Iterable[Any]) -> dict[str, Any]:
    """Return the named variables and those that have no name yet, under "other/"."""
    found = _Names(named)
    found.add("other", variables)
    return found.variables


def restore(trainer: Any, path: str | os.PathLike[str], roles: Iterable[str] = ("model",)) -> None:
    """Assign the values in a file of the runner to the variables of a trainer, by name.

    Args:
        trainer: a compiled trainer, built as the one that was exported.
        path: the path of an `.npz` file of the runner, such as `run/dense-best.npz`.
        roles: the roles, of `ROLES`, whose variables are assigned. Variables that the file lacks
            keep their values, except for those of the "model".

    Raises:
        ValueError: the file lacks a variable of the model, or has another shape for a variable.
    """
    chosen = tuple(f"{role}/" for role in roles)
    with np.load(path) as held:
        for name, variable in trainer_variables(trainer).items():
            if not name.startswith(chosen) or (name not in held and not name.startswith("model/")):
                continue
            if name not in held or held[name].shape != tuple(variable.shape):
                has = f"shape {held[name].shape}" if name in held else "nothing of that name"
                raise ValueError(
                    f"path {os.fspath(path)!r} does not fit the trainer: {name!r} has shape "
                    f"{tuple(variable.shape)}, the file {has}. Build the trainer as the exported "
                    "one, with the same names of layers."
                )
            value = held[name]
            # NumPy's files store bfloat16 as plain bytes.
            value = value.view(variable.dtype.as_numpy_dtype) if value.dtype.kind == "V" else value
            variable.assign(value)


class _Names:
    """Variables by unique names; a variable keeps the first name that it gets."""

    def __init__(self, named: Mapping[str, Any] | None = None) -> None:
        self.variables: dict[str, Any] = dict(named or {})
        self._names = {id(variable.handle): name for name, variable in self.variables.items()}

    def add(self, role: str, variables: Iterable[Any], path: str | None = None) -> None:
        """Name those of the variables that have no name yet; by `path`, if it is given."""
        for variable in variables:
            # In half precision Keras returns the same variable in several wrappers.
            key = id(tensor_variable(variable).handle)
            if key in self._names:
                continue
            wanted = name = f"{role}/{_path(variable) if path is None else path}"
            count = 1
            while name in self.variables:
                count += 1
                name = f"{wanted}#{count}"
            self.variables[name] = tensor_variable(variable)
            self._names[key] = name

    def path_of(self, variable: Any) -> str:
        """Return the name of a variable without its role."""
        return self._names[id(tensor_variable(variable).handle)].partition("/")[2]


def _path(variable: Any) -> str:
    path = getattr(variable, "path", None) or variable.name
    return path.removesuffix(":0")
