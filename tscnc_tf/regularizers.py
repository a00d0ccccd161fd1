"""The constraints as regularizers for `kernel_regularizer=` and the like, in both Keras versions.

There is one class per constraint, configured by numbers and names only, so that each is saved with
a model, and loaded from `.keras` and `.h5` files after `import tscnc_tf`.

A regularizer gets the kernel but not its layer: see `KernelRegularizer` for the layers that need
the argument `layout`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Self

import tensorflow as tf

from tscnc_tf import _checks, _keras, functional
from tscnc_tf._keras import layers as kernel_layers
from tscnc_tf._keras import optimizers
from tscnc_tf.functional.kernels import GROUPS, LAYOUTS

__all__ = ["ConditionNumber", "KernelRegularizer", "RegularizerSum", "TSCNC", "TransformedL1"]

FORMS = ("log_ratio", "authors", "orthogonal")
# Below it, rounding in float64 outweighs the ridge, and a singular matrix can't be factorised.
_MIN_RIDGE = 1e-12
# Keras' names of the layers inside attention layers, and of an EinsumDense without a name.
_PROJECTIONS = ("query", "key", "value", "gate")
_ATTENTION_OUTPUT = "attention_output"
_EINSUM = re.compile(r"einsum_dense(_\d+)?")


class KernelRegularizer(_keras.Regularizer):
    """Base of penalties on a kernel, with the meaning of the kernel's axes.

    Subclasses are final: they set their own arguments and implement `_penalty`.

    Args:
        layout: "standard" (..., in, out) for Dense and Conv, "transposed" (..., out, in) for the
            transposed convolutions, "depthwise" (..., in, multiplier) for depthwise kernels. Or a
            letter for each axis, p for positions, i for inputs and o for outputs: "ioo" for an
            EinsumDense of the equation "abc,cde->abde". "attention" is for all kernels of a
            MultiHeadAttention or GroupQueryAttention: (in, heads, size) of query, key and value,
            (heads, size, out) of the output projection.
        channel_groups: `groups` of a grouped convolution.

    Neither can be derived from the kernel. `pruning.add_regularizers` takes them from the layer;
    otherwise pass them where a layer needs other values than the defaults. With the default layout,
    a kernel of rank 3 or more is refused if its name shows that it belongs to an EinsumDense or to
    attention, since its axes would be misread. A tensor, or the kernel of an EinsumDense with a
    custom name, is not recognised, but needs `layout` as well. `AdversarialTraining` knows the
    layers, and refuses an EinsumDense without it.
    """

    def __init__(self, *, layout: str = "standard", channel_groups: int = 1) -> None:
        self.layout = _layout(layout)
        self.channel_groups = _checks.integer("channel_groups", channel_groups, minimum=1)

    def __call__(self, kernel: Any) -> tf.Tensor:
        """Return the penalty of one kernel, a scalar: float32, or float64 for a float64 kernel.

        Raises:
            TypeError: the kernel is not of a float dtype.
            ValueError: its shape is not known, or its name shows that `layout` does not fit.
        """
        tensor = tf.convert_to_tensor(kernel)
        if not tensor.dtype.is_floating:
            raise TypeError(f"kernel must be of a float dtype, got {tensor.dtype.name}.")
        reads_axes = self._reads_axes and tensor.shape.rank
        reading = self._for_variable(kernel, tuple(tensor.shape)) if reads_axes else self
        return reading._penalty(_checks.widened(tensor))

    @property
    def _reads_axes(self) -> bool:
        """Whether the penalty depends on which axes are inputs and which outputs."""
        return True

    def _for_variable(self, kernel: Any, shape: tuple[int | None, ...]) -> Self:
        """Return this regularizer with the layout that follows from the name of a variable.

        Raises:
            ValueError: the name shows that `layout` does not fit.
        """
        path, owner = _names(kernel)
        rank = len(shape)
        in_attention = ""
        if owner in _PROJECTIONS and rank == 3:
            in_attention = "ioo"
        elif owner == _ATTENTION_OUTPUT and rank > 2:
            in_attention = "ii" + "o" * (rank - 2)
        if self.layout == "attention":
            if not in_attention:
                raise ValueError(
                    "layout='attention' is for the kernels of MultiHeadAttention and "
                    f"GroupQueryAttention, got kernel {path!r} of shape {shape}: give a letter p, "
                    "i or o for each of its axes."
                )
            return self.for_kernel(layout=in_attention, channel_groups=1)
        is_standard = self.layout == "standard" and rank > 2
        misread = is_standard or (set(self.layout) <= set("io") and self.layout != in_attention)
        if (in_attention and misread) or (is_standard and _EINSUM.fullmatch(owner)):
            raise ValueError(
                f"layout={self.layout!r} does not fit kernel {path!r} of shape {shape}, which by "
                "its name is one of EinsumDense or of attention: another matrix would be read. "
                "Give layout='attention' for a MultiHeadAttention or GroupQueryAttention; for "
                "EinsumDense a letter for each axis, i for inputs and o for outputs, such as "
                "layout='ioo' for the equation 'abc,cde->abde'; for a convolution of that name, "
                "p for positions as well, such as layout='pio'."
            )
        return self

    def _misreads(self) -> bool:
        """Return whether the kernel of an EinsumDense would be read as that of a convolution."""
        return self._reads_axes and self.layout in LAYOUTS

    def _penalty(self, kernel: tf.Tensor) -> tf.Tensor:  # noqa: ARG002
        raise TypeError(f"{type(self).__name__} is abstract: use one of its subclasses.")

    def for_kernel(self, *, layout: str, channel_groups: int) -> Self:
        """Return a copy of this regularizer with another layout and number of groups."""
        config = {**self.get_config(), "layout": layout, "channel_groups": channel_groups}
        return type(self)(**config)

    @property
    def _reading(self) -> dict[str, Any]:
        return {"layout": self.layout, "channel_groups": self.channel_groups}

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return self._reading

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


@_keras.register
class TransformedL1(KernelRegularizer):
    r"""The sparse constraint: :math:`\text{factor} \cdot \sum_g T_a(\|w_g\|)`.

    With :math:`T_a(x) = (a+1)|x|/(a+|x|)`, over single weights or over groups of weights. Unlike
    the l1 norm it hardly shrinks large weights: the derivative falls as :math:`1/(a+|x|)^2`.

    Args:
        factor: a number >= 0.
        a: a number > 0; for small values the penalty approaches the number of non-zeros, for large
            ones the l1 norm.
        groups: None for single weights, "filter" for the weights of each output channel, "input"
            for those of each input channel.
        layout, channel_groups: the meaning of the kernel's axes, see `KernelRegularizer`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import tf_keras
        >>> import tscnc_tf as tscnc
        >>> layer = tf_keras.layers.Dense(
        ...     10, kernel_regularizer=tscnc.regularizers.TransformedL1(1e-5, groups="input"))

    Reference:
        Ma et al. 2019, arXiv 1901.01021; TSCNC, arXiv 2503.20454, for its use.
    """

    def __init__(
        self,
        factor: float,
        a: float = 1.0,
        groups: str | None = None,
        *,
        layout: str = "standard",
        channel_groups: int = 1,
    ) -> None:
        super().__init__(layout=layout, channel_groups=channel_groups)
        self.factor = _checks.factor("factor", factor)
        self.a = _checks.number("a", a, above=0.0)
        self.groups = _checks.one_of("groups", groups, (None, *GROUPS))

    def _penalty(self, kernel: tf.Tensor) -> tf.Tensor:
        if self.groups is not None:
            kernel = functional.group_norms(kernel, self.groups, **self._reading)
        return self.factor * tf.reduce_sum(functional.transformed_l1(kernel, self.a))

    @property
    def _reads_axes(self) -> bool:
        return self.groups is not None

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"factor": self.factor, "a": self.a, "groups": self.groups, **super().get_config()}


@_keras.register
class ConditionNumber(KernelRegularizer):
    r"""The condition number constraint: :math:`\text{factor} \cdot C(M)`, M the kernel as a matrix.

    Forms:

    * `"log_ratio"` (default): :math:`C = \log(\mathrm{tr} G / n) - \tfrac1n\log\det G`,
      :math:`G = M^\top M`; see `functional.log_ratio`. Invariant to scale, 0 exactly if the
      condition number is 1, and without the ridge it bounds it: :math:`\kappa < 2 e^{nC/2}`.
    * `"authors"`: :math:`(\log(10^{-5} + \det(G/n)))^2`, the penalty of the authors' code, to
      compare with; see `functional.authors_penalty` for its limits.
    * `"orthogonal"`: :math:`\|G n/\mathrm{tr}G - I\|_F^2`, soft orthogonality up to scale.

    A kernel that is read as several matrices (grouped and depthwise convolutions) has the mean of
    their penalties, so that all layers have equal weight. Dead filters have a zero gradient, and no
    effect on the others; see `functional.log_ratio`.

    The factorisation costs about `p n² + n³` operations in float64 per step for a `(p, n)` matrix:
    negligible beside an adversarial step on convolutions, but more than the step itself for dense
    layers with many hundreds of inputs and units. Use `every` for those.

    Args:
        factor: a number >= 0.
        form: one of the three names above.
        ridge: for `log_ratio`, relative to the mean eigenvalue of G, >= 1e-12; eigenvalues far
            below it have hardly any effect.
        every: k >= 1: in `AdversarialTraining`, only each k-th step has the penalty, multiplied by
            k, so that its mean over k steps is that of k = 1 as long as the kernel changes little
            between them; in other steps it is 0 and costs nothing. Use it with SGD with momentum,
            and k well below the steps of an epoch. Quantities that are normalised per step do not
            average over k steps: gradients clipped by norm, Adam's second moments, scores
            perturbed by `perturb_scores`. Outside of `AdversarialTraining`, as in Keras' own `fit`,
            each step has the full penalty.
        layout, channel_groups: the meaning of the kernel's axes, see `KernelRegularizer`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import tf_keras
        >>> import tscnc_tf as tscnc
        >>> layer = tf_keras.layers.Conv2D(
        ...     16, 3, kernel_regularizer=tscnc.regularizers.ConditionNumber(1e-2))

    Reference:
        TSCNC, arXiv 2503.20454; Guggenheimer, Edelman & Johnson 1995 for the bound; Bansal et al.
        2018, arXiv 1810.09102, for soft orthogonality; Karras et al. 2020, arXiv 1912.04958,
        appendix B, for a penalty in each k-th step ("lazy regularization").
    """

    def __init__(
        self,
        factor: float,
        form: str = "log_ratio",
        ridge: float = 1e-6,
        *,
        every: int = 1,
        layout: str = "standard",
        channel_groups: int = 1,
    ) -> None:
        super().__init__(layout=layout, channel_groups=channel_groups)
        self.factor = _checks.factor("factor", factor)
        self.form = _checks.one_of("form", form, FORMS)
        self.ridge = _ridge(ridge)
        self.every = _checks.integer("every", every, minimum=1)

    def _penalty(self, kernel: tf.Tensor) -> tf.Tensor:
        step = optimizers.step_in_progress()
        if self.every == 1 or step is None:
            return self._in_full(kernel)
        return tf.cond(
            tf.equal(step % self.every, 0),
            lambda: self.every * self._in_full(kernel),
            lambda: tf.zeros((), kernel.dtype),
        )

    def _in_full(self, kernel: tf.Tensor) -> tf.Tensor:
        matrices = functional.matrices(kernel, **self._reading)
        if self.form == "log_ratio":
            values = functional.log_ratio(matrices, ridge=self.ridge)
        elif self.form == "authors":
            values = functional.authors_penalty(matrices)
        else:
            values = functional.orthogonality(matrices)
        return self.factor * tf.reduce_mean(values)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        own = {"factor": self.factor, "form": self.form, "ridge": self.ridge, "every": self.every}
        return {**own, **super().get_config()}


@_keras.register
class TSCNC(KernelRegularizer):
    r"""Both constraints: `TransformedL1` with one factor plus `ConditionNumber` with another.

    Args:
        sparsity_factor: factor of the sparse constraint, >= 0.
        condition_factor: factor of the condition number constraint, >= 0.
        a, groups: see `TransformedL1`.
        form, ridge, every: see `ConditionNumber`; each step has the sparse constraint.
        layout, channel_groups: the meaning of the kernel's axes, see `KernelRegularizer`.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import tf_keras
        >>> import tscnc_tf as tscnc
        >>> layer = tf_keras.layers.Dense(
        ...     10, kernel_regularizer=tscnc.regularizers.TSCNC(1e-5, 1e-2))

    Reference:
        TSCNC, arXiv 2503.20454.
    """

    def __init__(
        self,
        sparsity_factor: float,
        condition_factor: float,
        a: float = 1.0,
        groups: str | None = None,
        form: str = "log_ratio",
        ridge: float = 1e-6,
        *,
        every: int = 1,
        layout: str = "standard",
        channel_groups: int = 1,
    ) -> None:
        super().__init__(layout=layout, channel_groups=channel_groups)
        self.sparsity_factor = _checks.factor("sparsity_factor", sparsity_factor)
        self.condition_factor = _checks.factor("condition_factor", condition_factor)
        self._sparse = TransformedL1(sparsity_factor, a, groups, **self._reading)
        self._condition = ConditionNumber(
            condition_factor, form, ridge, every=every, **self._reading
        )

    def _penalty(self, kernel: tf.Tensor) -> tf.Tensor:
        return self._sparse(kernel) + self._condition(kernel)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        parts = {**self._sparse.get_config(), **self._condition.get_config()}
        del parts["factor"]
        own = {"sparsity_factor": self.sparsity_factor, "condition_factor": self.condition_factor}
        return {**own, **parts}


@_keras.register
class RegularizerSum(_keras.Regularizer):
    """The sum of several regularizers, Keras' own included.

    Args:
        regularizers: a list of regularizers of one Keras, of this package, or names such as "l2".
        library: the Keras in which names are looked up, "tf_keras" or "keras"; None for that of the
            regularizers, or tf_keras if all are names or of this package.

    Raises:
        TypeError: `regularizers` is not a list.
        ValueError: the list is empty, or mixes both Keras versions.

    Example:
        >>> import tf_keras
        >>> import tscnc_tf as tscnc
        >>> both = tscnc.regularizers.RegularizerSum(
        ...     [tf_keras.regularizers.L2(5e-4), tscnc.regularizers.ConditionNumber(1e-2)])
    """

    def __init__(self, regularizers: list[Any], library: str | None = None) -> None:
        if not isinstance(regularizers, Sequence) or isinstance(regularizers, str):
            raise TypeError(
                f"regularizers must be a list, got {regularizers!r} of type "
                f"{type(regularizers).__name__}."
            )
        if not regularizers:
            raise ValueError("regularizers must hold at least one regularizer, got an empty list.")
        _checks.one_of("library", library, (None, *_keras.LIBRARIES))
        flavours = [library, *(_keras.flavour(r) for r in regularizers if not _is_ours(r))]
        known = {flavour for flavour in flavours if flavour is not None}
        if len(known) > 1:
            raise ValueError(
                f"regularizers must be of one Keras, got {regularizers!r} of {sorted(known)}."
            )
        self.library = known.pop() if known else "tf_keras"
        module = _keras.LIBRARIES[self.library]
        try:
            self.regularizers = [
                part if _is_ours(part) else module.regularizers.get(part) for part in regularizers
            ]
        except ValueError as error:
            raise ValueError(
                f"regularizers must be of {self.library} or of tscnc_tf.regularizers, got "
                f"{regularizers!r}: {error}"
            ) from None

    def __call__(self, kernel: Any) -> tf.Tensor:
        """Return the sum of the penalties of one kernel."""
        values = [tf.convert_to_tensor(part(kernel)) for part in self.regularizers]
        widest = tf.float64 if any(v.dtype == tf.float64 for v in values) else tf.float32
        return tf.add_n([tf.cast(value, widest) for value in values])

    def for_kernel(self, *, layout: str, channel_groups: int) -> Self:
        """Return a copy of this sum with another layout and number of groups."""
        parts = [
            part.for_kernel(layout=layout, channel_groups=channel_groups)
            if _is_ours(part)
            else part
            for part in self.regularizers
        ]
        return type(self)(parts, self.library)

    def get_config(self) -> dict[str, Any]:
        """Return the parts as serialized by their Keras."""
        module = _keras.LIBRARIES[self.library]
        parts = [module.regularizers.serialize(part) for part in self.regularizers]
        return {"regularizers": parts, "library": self.library}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a sum from `get_config()`."""
        module = _keras.LIBRARIES[config["library"]]
        parts = [module.regularizers.deserialize(part) for part in config["regularizers"]]
        return cls(parts, config["library"])

    def __repr__(self) -> str:
        return f"RegularizerSum({self.regularizers!r})"


def with_groups(regularizer: Any, channel_groups: int) -> Any:
    """Return a regularizer for a kernel of another number of groups; one of Keras is returned."""
    if isinstance(regularizer, RegularizerSum):
        parts = [with_groups(part, channel_groups) for part in regularizer.regularizers]
        return RegularizerSum(parts, regularizer.library)
    if not isinstance(regularizer, KernelRegularizer) or regularizer.channel_groups == 1:
        return regularizer
    return regularizer.for_kernel(layout=regularizer.layout, channel_groups=channel_groups)


def require_layouts(model: Any) -> None:
    """Raise a ValueError if a regularizer of an EinsumDense in a model has an unsuitable layout.

    Args:
        model: a built model of either Keras.
    """
    kinds = (_keras.keras.layers.EinsumDense, _keras.tf_keras.layers.EinsumDense)
    for layer in kernel_layers.flatten(model):
        if not isinstance(layer, kinds) or not layer.built or len(layer.kernel.shape) < 3:
            continue
        if _any_misreads(layer.kernel_regularizer):
            equation = layer.equation
            letters = kernel_layers.einsum_layout(equation, len(layer.kernel.shape))
            raise ValueError(
                f"layout must be given to the kernel_regularizer of layer {layer.name!r}, an "
                f"EinsumDense of the equation {equation!r} with a kernel of shape "
                f"{tuple(layer.kernel.shape)}: {layer.kernel_regularizer!r} would read another "
                "matrix. " + (f"Give layout={letters!r}." if letters else "It is not one matrix.")
            )


def _any_misreads(regularizer: Any) -> bool:
    if isinstance(regularizer, RegularizerSum):
        return any(_any_misreads(part) for part in regularizer.regularizers)
    return isinstance(regularizer, KernelRegularizer) and regularizer._misreads()


def _layout(value: Any) -> str:
    names = (*LAYOUTS, "attention")
    if isinstance(value, str) and (value in names or (value and set(value) <= set("pio"))):
        return value
    raise ValueError(
        f"layout must be one of {names}, or have a letter p, i or o for each axis of the kernel, "
        f"such as 'ioo', got {value!r}."
    )


def _names(kernel: Any) -> tuple[str, str]:
    """Return the full name of a kernel, and that of its layer; empty strings for a tensor."""
    if not isinstance(kernel, tf.Variable | _keras.keras.Variable):
        return "", ""
    path = getattr(kernel, "path", kernel.name).partition(":")[0]  # Keras 3: the full name
    return path, path.rpartition("/")[0].rpartition("/")[2]


def _ridge(value: Any) -> float:
    try:
        return _checks.number("ridge", value, minimum=_MIN_RIDGE)
    except ValueError as error:
        raise ValueError(
            f"{error} A smaller one is lost in rounding, and singular kernels give NaN; "
            "the default is 1e-6."
        ) from None


def _is_ours(regularizer: Any) -> bool:
    return isinstance(regularizer, KernelRegularizer | RegularizerSum)
