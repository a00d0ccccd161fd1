"""The attacks of an evaluation: their names, and checks of what they return."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tscnc_tf import _checks, _reports
from tscnc_tf import attacks as attacks_
from tscnc_tf.attacks.base import CompiledAttack


class Source(NamedTuple):
    """The model that a `Transfer` runs on.

    Attributes:
        model: the model.
        name: its name.
        by_gradient: whether the attack may use the gradient of the model.
    """

    model: Any
    name: str
    by_gradient: bool


class Adversary(NamedTuple):
    """An attack of an evaluation.

    Attributes:
        name: its name, unique in the evaluation.
        attack: an `attacks.Attack`, or a plain callable `(model, x, y) -> x_adv`.
        description: the result of `attack.describe()`; empty for a plain callable.
    """

    name: str
    attack: Callable[..., Any]
    description: Mapping[str, Any]

    @property
    def epsilon(self) -> float | None:
        """The radius of the ball that the attack declares, or None."""
        return self.description.get("epsilon_value")

    @property
    def identity(self) -> dict[str, Any]:
        """The description, and a digest of the code of what is not of this package."""
        attack = self.attack
        if isinstance(attack, attacks_.Transfer):
            attack = attack.attack
        own = attack.function if isinstance(attack, attacks_.Custom) else attack
        is_ours = type(own).__module__.startswith(f"{attacks_.__name__}.")
        options = dict(getattr(own, "options", ())).values() if is_ours else ()
        foreign = [each for each in options if callable(each)] if is_ours else [own]
        text = "".join(map(_code, foreign))
        code = {"code": hashlib.sha256(text.encode()).hexdigest()} if foreign else {}
        return dict(self.description) | code

    @property
    def uses_gradient(self) -> bool:
        """Whether the attack may use the gradient of the model; True for a plain callable."""
        return not isinstance(self.attack, attacks_.Attack) or self.attack.uses_gradient

    @property
    def is_compiled(self) -> bool:
        """Whether the attack runs compiled, without state in Python."""
        return isinstance(self.attack, CompiledAttack)

    @property
    def source(self) -> Source | None:
        """The model that a `Transfer` runs on; None for other attacks."""
        if not isinstance(self.attack, attacks_.Transfer):
            return None
        inner = self.attack.attack
        return Source(self.attack.source, self.description["source"], inner.uses_gradient)

    @property
    def parts(self) -> list[Adversary]:
        """The attacks of an ensemble, in order; empty for other attacks."""
        if not isinstance(self.attack, attacks_.AutoAttack):
            return []
        return [Adversary(part.name, part, part.describe()) for part in self.attack.attacks]

    def require_classes(self, classes: int) -> None:
        """Raise a ValueError if the attack needs more classes."""
        attack = self.attack
        if isinstance(attack, attacks_.Transfer):
            attack = attack.attack
        if isinstance(attack, attacks_.AutoAttack):
            attack.require_classes(classes)

    def bind(self, model: Any) -> Callable[[np.ndarray, np.ndarray, tuple[int, int]], Any]:
        """Return the attack on one model as a function of a batch (x, y) and a seed."""
        if isinstance(self.attack, attacks_.Attack):
            bound = self.attack.bind(model)
            return lambda x, y, seed: bound(tf.constant(x), tf.constant(y), seed=seed)
        return lambda x, y, seed: self.attack(model, tf.constant(x), tf.constant(y))  # noqa: ARG005


def as_adversaries(attacks: Any, bounds: tuple[float, float]) -> list[Adversary]:
    """Return one attack, a sequence of attacks, or a mapping from names to attacks as a list.

    Raises:
        TypeError: one of them is not an attack.
        ValueError: there are none, or one of them is targeted or has other bounds.
    """
    named: list[tuple[str | None, Any]]
    if isinstance(attacks, Mapping):
        named = [(str(name), attack) for name, attack in attacks.items()]
    elif isinstance(attacks, Iterable) and not isinstance(attacks, str):
        named = [(None, attack) for attack in attacks]
    else:
        named = [(None, attacks)]
    if not named:
        raise ValueError(
            "attacks is empty: robust accuracy needs at least one attack. For clean accuracy alone "
            "use model.evaluate."
        )
    for _, attack in named:
        _require_attack(attack, bounds)
    names = _reports.unique(_name(attack) if name is None else name for name, attack in named)
    return [
        Adversary(name, attack, dict(_describe(attack)))
        for name, (_, attack) in zip(names, named, strict=True)
    ]


def checked(
    adversary: Adversary, x: np.ndarray, result: Any, bounds: tuple[float, float]
) -> tuple[np.ndarray, dict[str, float]]:
    """Check the result of an attack; return it as float32, and its largest distance by norm.

    Raises:
        TypeError: the result is not a float tensor.
        ValueError: its shape is not that of `x`, it is not finite, or it lies outside the bounds or
            the ball that the attack declares.
    """
    attack = f"attack {adversary.name!r}"
    try:
        found = np.asarray(result)
        is_float = tf.as_dtype(found.dtype).is_floating
    except (TypeError, ValueError):
        is_float = False
    if not is_float:
        raise TypeError(
            f"{attack} must return a tensor of floats like x, got {type(result).__name__}."
        )
    if found.shape != x.shape:
        raise ValueError(
            f"{attack} must return inputs of the shape of x, {x.shape}, got {found.shape}."
        )
    found = found.astype(np.float32)
    if not np.all(np.isfinite(found)):
        raise ValueError(f"{attack} returned NaN or infinity: look at its loss and step size.")
    if not _checks.within(found.min(), found.max(), bounds):
        raise ValueError(
            f"{attack} left bounds={bounds}: its values go from {found.min():g} to "
            f"{found.max():g}. Give it the same bounds as the evaluation, or clip its result."
        )
    delta = (found.astype(np.float64) - x).reshape(len(x), -1)
    moved = {
        "linf": float(np.max(np.abs(delta))),
        "l2": float(np.max(np.linalg.norm(delta, axis=1))),
        "l1": float(np.max(np.sum(np.abs(delta), axis=1))),
    }
    norm, epsilon = adversary.description.get("norm"), adversary.epsilon
    # Near 255 a float32 is accurate to about 1e-5 only.
    rounding = max(1e-6, float(np.finfo(np.float32).eps) * max(map(abs, bounds)))
    if epsilon is not None and norm in moved and moved[norm] > epsilon * (1 + 1e-4) + rounding:
        raise ValueError(
            f"{attack} left its ball: it moved an input by {moved[norm]:.6g} in {norm}, and "
            f"declares epsilon={adversary.description.get('epsilon', epsilon)} ({epsilon:.6g}). "
            "Project its result onto the ball, or declare the epsilon that it uses."
        )
    return found, moved


def _require_attack(attack: Any, bounds: tuple[float, float]) -> None:
    if isinstance(attack, type) or not callable(attack):
        found = repr(attack) if isinstance(attack, type) else f"{type(attack).__name__} {attack!r}"
        raise TypeError(
            "attacks must hold attacks, such as attacks.PGD(epsilon='8/255'), or callables "
            f"(model, x, y) -> x_adv, got {found}."
        )
    if _describe(attack).get("targeted"):
        raise ValueError(
            f"attack {_name(attack)!r} is targeted: it uses y as target classes, but an evaluation "
            "passes the true classes, so its failures do not show robustness. Pass the untargeted "
            "attack; or choose the targets in a function and declare its ball with attacks.Custom."
        )
    own = tuple(_describe(attack).get("bounds") or bounds)
    if own != bounds:
        raise ValueError(
            f"attack {_name(attack)!r} has bounds={own}, the evaluation bounds={bounds}. Narrower "
            "bounds make an attack weaker; with wider ones it leaves the range of the data. Give "
            "both the bounds of the data."
        )


def _code(function: Any) -> str:
    """Return the source of a function or of the class of an object, and the values that it holds.

    The code of other functions that it calls is not in it.
    """
    function = getattr(function, "python_function", function)  # of a tf.function
    if isinstance(function, functools.partial):
        return f"{_code(function.func)} {_values((function.args, function.keywords))}"
    if inspect.ismethod(function):
        return f"{_code(function.__func__)} {_values(getattr(function.__self__, '__dict__', {}))}"
    is_function = inspect.isroutine(function)
    try:
        text = inspect.getsource(function if is_function else type(function))
    except (OSError, TypeError):  # from a prompt, or not written in Python
        text = getattr(function, "__qualname__", type(function).__qualname__)
    if not inspect.isfunction(function):
        return f"{text} {_values(getattr(function, '__dict__', {}))}"
    outer = dict(inspect.getclosurevars(function).nonlocals)
    return f"{text} {_values((outer, function.__defaults__, function.__kwdefaults__))}"


def _values(values: Any) -> str:
    """Return plain values as text; of other objects, such as models, their class only."""
    if isinstance(values, Mapping):
        return str({str(key): _values(value) for key, value in values.items()})
    if isinstance(values, list | tuple):
        return str([_values(value) for value in values])
    if isinstance(values, set | frozenset):
        return str(sorted(_values(value) for value in values))
    if isinstance(values, np.ndarray | tf.Tensor):
        return _reports.digest([("", np.asarray(values))])
    if values is None or isinstance(values, bool | int | float | complex | str | bytes):
        return repr(values)
    return type(values).__qualname__


def _describe(attack: Any) -> Mapping[str, Any]:
    return attack.describe() if isinstance(attack, attacks_.Attack) else {}


def _name(attack: Any) -> str:
    if isinstance(attack, attacks_.Attack):
        return str(attack.name)
    name = getattr(attack, "__name__", type(attack).__name__)
    return "attack" if name == "<lambda>" else name
