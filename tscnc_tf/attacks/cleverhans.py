"""Attacks of the library CleverHans, from its TensorFlow 2 modules."""

from __future__ import annotations

import builtins
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import tensorflow as tf

from tscnc_tf import _checks, _keras, losses
from tscnc_tf.attacks.base import Attack
from tscnc_tf.attacks.pgd import Ascent
from tscnc_tf.functional import balls

_ATTACKS = "cleverhans.tf2.attacks"
_ORDERS = {"linf": math.inf, "l2": 2}  # the norms in CleverHans' notation
# Arguments of CleverHans that can't be options, since epsilon, norm, bounds and the call set them;
# and "sanity_checks", which repeat the checks made here, and fail with NumPy 2.
_RESERVED = (
    *("model_fn", "x", "y", "eps", "norm", "clip_min", "clip_max"),
    *("batch_size", "sanity_checks"),
)
_DISTANCES = ("eps_iter", "rand_minmax")  # options that may be written as fractions
# Options whose defaults are in units of the inputs to this power, for inputs from 0 to 1.
_IN_UNITS_OF_INPUTS = {
    "carlini_wagner_l2": {"initial_const": 2},
    "spsa": {"learning_rate": 1, "delta": 1},
}
_REQUIRED = inspect.Parameter.empty


class _Kind(NamedTuple):
    """Properties of an attack that are not in its CleverHans signature."""

    norms: tuple[str, ...] = ("linf", "l2")
    objective: str = "cross_entropy"
    start: str = "none"
    steps: str | int = "nb_iter"


_KINDS = {
    "basic_iterative_method": _Kind(),
    "carlini_wagner_l2": _Kind(norms=("l2",), objective="margin", steps="max_iterations"),
    "fast_gradient_method": _Kind(steps=1),
    "madry_et_al": _Kind(start="uniform"),
    "momentum_iterative_method": _Kind(),
    "projected_gradient_descent": _Kind(),
    "spsa": _Kind(norms=("linf",), objective="margin", start="uniform"),
}


@final
@_keras.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class CleverHans(Attack):
    """An attack of the library CleverHans (`cleverhans.tf2.attacks`), by its name there.

    - "fast_gradient_method", "basic_iterative_method", "projected_gradient_descent",
      "madry_et_al" and "momentum_iterative_method" follow the gradient of the cross-entropy
      ("linf" and "l2").
    - "carlini_wagner_l2" searches for the smallest perturbation that fools the model (norm "l2").
      The result is returned if it lies inside the ball, else x itself.
    - "spsa" estimates a gradient from logits at random points ("linf"), without the gradient of the
      model, so it can attack exported files as well. It is slow, as it runs example by example:
      ``nb_iter * spsa_samples * spsa_iters`` logits per example.

    CleverHans runs eagerly, and so does this attack; it can't be called while a graph is traced.
    `bind`, and an evaluation, compile the parts shared by all batches: the gradient, or all of
    "spsa". Random numbers come from `seed` only; TensorFlow's own generators are neither read nor
    changed. Labels may be class indices, or rows, of which the largest entry is the class; without
    labels, the model's predictions are used.

    Args:
        attack: one of the names above; may be passed by position.
        epsilon: the radius, a number or a fraction such as "8/255".
        norm: "linf" or "l2".
        options: the other arguments of the attack, by CleverHans' names: a mapping, or pairs (name,
            value), the form in which they are stored. A step size may be a fraction. Defaults in
            units of the inputs ("learning_rate" and "delta" of "spsa", "initial_const" of
            "carlini_wagner_l2") are CleverHans' own for bounds of 0 and 1, and scaled to others.
        bounds: the smallest and the largest value that an input may take.

    Raises:
        TypeError, ValueError: as in `Attack`; or there is no such attack, it does not support the
            norm, or an option is unknown, missing, or set by this object.

    Example:
        >>> import tensorflow as tf
        >>> network = tf.constant([[1.0, -1.0], [0.0, 2.0]])
        >>> attack = CleverHans(
        ...     "momentum_iterative_method", epsilon="8/255",
        ...     options={"eps_iter": "2/255", "nb_iter": 10},
        ... )
        >>> attack.name
        'CleverHans momentum_iterative_method linf 8/255'
        >>> x = tf.constant([[0.5, 0.5]])
        >>> adversarial = attack(lambda x: x @ network, x, [0])
        >>> [round(float(entry), 4) for entry in (adversarial - x)[0]]
        [-0.0314, 0.0314]

    Reference:
        Papernot et al. 2018, arXiv 1610.00768; and Goodfellow et al. 2015, arXiv 1412.6572, Kurakin
        et al. 2017, arXiv 1607.02533, Madry et al. 2018, arXiv 1706.06083, Dong et al. 2018, arXiv
        1710.06081, Carlini & Wagner 2017, arXiv 1608.04644, Uesato et al. 2018, arXiv 1802.05666.
    """

    attack: str = dataclasses.field(kw_only=False)
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        _checks.one_of("attack", self.attack, _KINDS)
        super().__post_init__()
        if self.norm not in self._kind.norms:
            raise ValueError(
                f"norm must be {' or '.join(map(repr, self._kind.norms))} for {self.attack!r}, "
                f"got {self.norm!r}."
            )
        try:
            self._set("options", tuple(sorted(dict(self.options).items())))
        except (TypeError, ValueError):
            raise TypeError(
                "options must be a mapping from CleverHans' names to values, such as "
                f"{{'nb_iter': 10}}, got {self.options!r}."
            ) from None
        self._check_options()

    @property
    def uses_gradient(self) -> bool:
        """Whether it uses the gradient of the model: False for "spsa"."""
        return self.attack != "spsa"

    @property
    def name(self) -> str:
        """A short name for tables, such as "CleverHans momentum_iterative_method linf 8/255"."""
        targeted = " targeted" if self.targeted else ""
        return f"{type(self).__name__} {self.attack} {self._ball}{targeted}"

    @property
    def targeted(self) -> bool:
        """Whether y are target classes, an option of CleverHans' attacks."""
        return bool(self._option("targeted"))

    def describe(self) -> dict[str, Any]:
        """Return the description for reports; "options" holds the given options."""
        options = {name: getattr(value, "__name__", value) for name, value in self._given.items()}
        step_size, steps = self._option("eps_iter"), self._kind.steps
        known = (
            {}
            if step_size is None
            else {
                "step_size": _checks.as_written(step_size),
                "step_size_value": _checks.distance("eps_iter", step_size),
            }
        )
        return (
            super().describe()
            | known
            | {
                "steps": steps if isinstance(steps, int) else self._option(steps),
                "objective": options.get("loss_fn") or self._kind.objective,
                "targeted": self.targeted,
                "start": "uniform" if options.get("rand_init") else self._kind.start,
                "options": options,
            }
        )

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for CleverHans' attack, except the model, x and y."""
        low, high = self.bounds
        common = {
            "eps": self.epsilon_value,
            "norm": _ORDERS[self.norm],
            "clip_min": low,
            "clip_max": high,
            "sanity_checks": False,
        }
        known = _parameters(self.attack)
        defaults = {name: value for name, value in common.items() if name in known}
        for name, power in _IN_UNITS_OF_INPUTS.get(self.attack, {}).items():
            defaults[name] = known[name] * (high - low) ** power
        options = {
            name: _checks.distance(name, value) if name in _DISTANCES and value else value
            for name, value in self._given.items()
        }
        return defaults | options

    @property
    def _kind(self) -> _Kind:
        return _KINDS[self.attack]

    @property
    def _given(self) -> dict[str, Any]:
        return dict(self.options)

    def _option(self, name: str) -> Any:
        """Return an option or its default in CleverHans; None if the attack has no such option."""
        return self._given.get(name, _parameters(self.attack).get(name))

    def _check_options(self) -> None:
        """Raise a ValueError unless the options fit the signature of CleverHans' attack."""
        known = {n: d for n, d in _parameters(self.attack).items() if n not in _RESERVED}
        for name, value in self._given.items():
            if name in _RESERVED:
                raise ValueError(
                    f"options must not hold {name!r}: epsilon, norm, bounds and the call of the "
                    "attack set it."
                )
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
                raise ValueError(f"options: {name!r} is not an option of {self.attack}: {hint}")
            if name in _DISTANCES and value is not None:
                _checks.distance(f"options[{name!r}]", value)
        required = [name for name, default in known.items() if default is _REQUIRED]
        if not set(required) <= set(self._given):
            raise ValueError(
                f"options must hold {' and '.join(map(repr, required))}, for which CleverHans' "
                f"{self.attack} has no default, got {self._given}."
            )
        step_size = self._option("eps_iter")
        if "eps_iter" in required and _checks.distance("eps_iter", step_size) > self.epsilon_value:
            raise ValueError(
                f"options['eps_iter'] must be at most epsilon, {self.epsilon_value:g}, for "
                f"{self.attack!r}, got {step_size!r}."
            )

    def _generate(self, model: Any, x: tf.Tensor, y: Any, seed: tf.Tensor) -> tf.Tensor:
        return _Bound(self, model, compiles=False)(x, y, seed)

    def _compiled(self, model: Any) -> Callable[..., tf.Tensor]:
        return _Bound(self, model, compiles=True)


class _Bound:
    """An attack on one model, with the functions that CleverHans compiles for it.

    Args:
        attack: the attack.
        model: any callable from x to logits.
        compiles: whether "spsa" is compiled as well.
    """

    def __init__(self, attack: CleverHans, model: Any, *, compiles: bool) -> None:
        self._attack = attack
        self._model = model
        self._compiles = compiles
        self._generator = tf.random.Generator.from_state([0, 0, 0], alg="philox")
        self._function = _load(attack.attack, _TensorFlow(self._generator))
        self._prepared: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        _keras.inference(model)  # raises if it is not a model

    def __call__(self, x: tf.Tensor, y: tf.Tensor | None, seed: tf.Tensor) -> tf.Tensor:
        """Return adversarial examples for checked inputs."""
        attack = self._attack
        if not tf.executing_eagerly():
            raise ValueError(
                f"{attack.name} can't be called while a graph is traced, as CleverHans runs "
                "eagerly: call it outside of tf.function."
            )
        if y is None and attack.targeted:
            raise ValueError("y is missing: a targeted attack needs the classes to reach.")
        logits_fn = _keras.inference(self._model)
        form = (x.dtype, *x.shape[1:])
        if form not in self._prepared:
            self._prepared[form] = self._prepare(logits_fn, x[:1])
        model_fn, run = self._prepared[form]
        anchor = tf.cast(x, tf.float32)
        logits = model_fn(anchor)
        if y is None:
            labels = tf.argmax(logits, axis=-1)
        else:
            _checks.require_classes(y, logits.shape[1])
            labels = tf.argmax(losses.one_hot(y, logits.shape[1]), axis=-1)
        high, low = (int(word) for word in seed)
        self._generator.reset([0, 0, (high << 32) | (low & 0xFFFFFFFF)])
        found = run(anchor, labels)
        if attack.attack == "carlini_wagner_l2":
            # It uses the predicted class as the label, and its result may lie outside of the ball.
            fooled = (tf.argmax(model_fn(found), axis=-1) == labels) == attack.targeted
            right = (tf.argmax(logits, axis=-1) == labels) != attack.targeted
            near = balls.lengths(found - anchor, attack.norm) <= attack.epsilon_value
            chosen = (fooled & right & near)[(slice(None), *[tf.newaxis] * (x.shape.rank - 1))]
            found = tf.where(chosen, found, anchor)
        return attack._rounded(x, found)

    def _prepare(
        self, logits_fn: Callable[..., Any], example: tf.Tensor
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return the model for CleverHans, and the attack as a function of (x, labels).

        Args:
            logits_fn: from x to logits, in inference mode.
            example: one input `(1, ...)`, of the shape and dtype of those that are attacked.
        """
        attack, shape = self._attack, example.shape[1:]
        ascent = Ascent(logits_fn, example, labels=[0], objective="cross_entropy", targeted=False)
        classes = ascent.logits(example).shape[1]
        if attack.uses_gradient:
            ascent.gradient(tf.cast(example, tf.float32))  # raises if there is none

        def model_fn(x: tf.Tensor) -> tf.Tensor:
            logits = ascent.logits(tf.reshape(x, (-1, *shape)))
            # The number of classes may be unknown in a graph, as with a Python function.
            return tf.cast(tf.ensure_shape(logits, (None, classes)), tf.float32)

        run = functools.partial(self._function, model_fn, **attack.arguments())

        def carlini_wagner(x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            # CleverHans accepts images only, and interprets given labels as targets.
            images = tf.reshape(x, (len(x), 1, 1, -1))
            y = labels if attack.targeted else None
            return tf.reshape(run(images, y=y, batch_size=len(x)), x.shape)

        def one_by_one(x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            return tf.concat([one(x[i : i + 1], labels[i : i + 1]) for i in range(len(x))], axis=0)

        one = tf.function(run, autograph=False) if self._compiles else run
        others = {"carlini_wagner_l2": carlini_wagner, "spsa": one_by_one}
        return model_fn, others.get(attack.attack, lambda x, labels: run(x, y=labels))


class _TensorFlow:
    """The module `tensorflow` as CleverHans 4.0 expects it: incompatible functions are replaced.

    Args:
        generator: the source of random numbers.
    """

    def __init__(self, generator: tf.random.Generator) -> None:
        adam = _keras.tf_keras.optimizers.legacy.Adam
        self.random = types.SimpleNamespace(
            uniform=_without_seed(generator.uniform), normal=_without_seed(generator.normal)
        )
        self.keras = types.SimpleNamespace(optimizers=types.SimpleNamespace(Adam=adam))
        self.optimizers = types.SimpleNamespace(Adam=_AdamOfSPSA)

    def __getattr__(self, name: str) -> Any:
        return getattr(tf, name)

    @staticmethod
    def while_loop(*args: Any, back_prop: bool, **more: Any) -> Any:
        """Run TensorFlow's loop without the deprecated argument `back_prop`."""
        del back_prop
        return tf.while_loop(*args, **more)

    @staticmethod
    def ones(shape: tf.TensorShape) -> tf.Tensor:
        """Return one 1 per example, which "carlini_wagner_l2" multiplies by losses per example."""
        return tf.ones(shape[:1])


def _without_seed(draw: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """Return a function that ignores the argument `seed`, since the generator has its own."""
    return lambda *args, seed=None, **more: draw(*args, **more)  # noqa: ARG005


class _AdamOfSPSA:
    """Base class of CleverHans' `SPSAAdam`, with the attributes that it reads."""

    beta_1, beta_2, epsilon = 0.9, 0.999, 1e-7

    def __init__(self, lr: float) -> None:
        self.lr = lr


def _load(attack: str, tensorflow: _TensorFlow) -> Callable[..., Any]:
    """Return an attack of CleverHans from private copies of its modules that use `tensorflow`.

    So the replaced functions do not affect other users of CleverHans, and the graphs that the
    attack compiles, which hold the weights of the model, are freed with it.
    """
    modules: dict[str, Any] = {"tensorflow": tensorflow}

    def load(name: str, *args: Any) -> Any:
        if name not in modules and not name.startswith("cleverhans."):
            return builtins.__import__(name, *args)
        if name not in modules:
            original = importlib.import_module(name)
            modules[name] = module = types.ModuleType(name)
            vars(module)["__builtins__"] = vars(builtins) | {"__import__": load}
            code = compile(inspect.getsource(original), str(original.__file__), "exec")
            exec(code, vars(module))
        return modules[name]

    return getattr(load(f"{_ATTACKS}.{attack}"), attack)


@functools.cache
def _parameters(attack: str) -> Mapping[str, Any]:
    """Return the names of the arguments of an attack of CleverHans, with their defaults."""
    module = importlib.import_module(f"{_ATTACKS}.{attack}")
    # The function carlini_wagner_l2 passes **kwargs on to the class.
    owner = "CarliniWagnerL2" if attack == "carlini_wagner_l2" else attack
    parameters = inspect.signature(getattr(module, owner)).parameters
    return {name: parameter.default for name, parameter in parameters.items()}
