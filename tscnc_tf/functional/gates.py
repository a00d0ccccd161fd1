"""The hard concrete distribution: gates in [0, 1] that can be exactly 0, and are trainable."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tscnc_tf import _checks

BETA = 2.0 / 3.0  # the temperature
GAMMA, ZETA = -0.1, 1.1  # the interval that (0, 1) is stretched to before it is clipped

# Uniform numbers are clipped to this distance from 0 and 1, where the logit is infinite; 1 - 2^-24
# is the largest float32 below 1.
_MARGIN = 2.0**-24
_PHILOX = tf.random.Algorithm.PHILOX.value


def hard_concrete(log_alpha: Any, uniform: Any) -> tf.Tensor:
    r"""Return samples of hard concrete gates, computed from uniform random numbers.

    .. math::
        s = \sigma\left(\frac{\log u - \log(1-u) + \log\alpha}{\beta}\right), \qquad
        z = \min(1, \max(0, s(\zeta - \gamma) + \gamma))

    with :math:`\beta = 2/3, \gamma = -0.1, \zeta = 1.1`. A gate is exactly 0 or exactly 1 with
    positive probability; otherwise it has a gradient with respect to :math:`\log\alpha`.

    Args:
        log_alpha: the location of each gate, a tensor of any shape.
        uniform: draws from U(0, 1), of a shape that broadcasts with `log_alpha`; clipped to a
            distance of 2^-24 from 0 and 1.

    Returns:
        Gates in [0, 1], float32, or float64 for a `log_alpha` of that dtype.

    Reference:
        Louizos, Welling & Kingma 2018, arXiv 1712.01312, equations 10 and 11.
    """
    log_alpha = _checks.widened(tf.convert_to_tensor(log_alpha))
    uniform = tf.cast(uniform, log_alpha.dtype)
    uniform = tf.clip_by_value(uniform, _MARGIN, 1.0 - _MARGIN)
    logit = tf.math.log(uniform) - tf.math.log1p(-uniform)
    return _stretched(tf.sigmoid((logit + log_alpha) / BETA))


def deterministic_gate(log_alpha: Any) -> tf.Tensor:
    r"""Return the deterministic gates of inference.

    .. math:: z = \min(1, \max(0, \sigma(\log\alpha)(\zeta - \gamma) + \gamma))

    They are 0 for :math:`\log\alpha \le -\log 11`, and 1 for :math:`\log\alpha \ge \log 11`. They
    estimate the gates' means.

    Args:
        log_alpha: the location of each gate, a tensor of any shape.

    Returns:
        Gates in [0, 1], float32, or float64 for a `log_alpha` of that dtype.

    Reference:
        Louizos, Welling & Kingma 2018, arXiv 1712.01312, equation 13.
    """
    return _stretched(tf.sigmoid(_checks.widened(tf.convert_to_tensor(log_alpha))))


def open_probability(log_alpha: Any) -> tf.Tensor:
    r"""Return :math:`P(z \ne 0) = \sigma(\log\alpha - \beta\log(-\gamma/\zeta))` of each gate.

    The sum is the expected number of non-zero gates (the expected L0 norm), which is differentiable
    everywhere.

    Args:
        log_alpha: the location of each gate, a tensor of any shape.

    Returns:
        Probabilities, float32, or float64 for a `log_alpha` of that dtype.

    Reference:
        Louizos, Welling & Kingma 2018, arXiv 1712.01312, equation 12.
    """
    return tf.sigmoid(
        _checks.widened(tf.convert_to_tensor(log_alpha)) - BETA * math.log(-GAMMA / ZETA)
    )


def uniform(count: int, seed: Any, draw: Any) -> tf.Tensor:
    """Return random numbers from U(0, 1), the same in eager code, in graphs and under XLA.

    `tf.random.stateless_uniform` is not used, since XLA derives the generator's key from the seed
    differently. The Philox generator itself gives equal numbers for equal keys and counters.

    Args:
        count: the number of random numbers.
        seed: the stream of random numbers, an integer >= 0; possibly a tensor.
        draw: the number of the draw from the stream, >= 0; possibly a tensor.

    Returns:
        A float32 vector of odd multiples of 2^-24, never 0 or 1.

    Reference:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", for Philox.
    """
    key = tf.reshape(tf.cast(seed, tf.uint64), (1,))
    # The lower half of the counter counts the numbers of one draw.
    counter = tf.stack([tf.zeros((), tf.uint64), tf.cast(draw, tf.uint64)])
    bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[count], key=key, counter=counter, alg=_PHILOX, dtype=tf.uint32
    )
    upper = tf.cast(tf.bitwise.right_shift(bits, tf.constant(9, tf.uint32)), tf.float32)
    return (upper + 0.5) * 2.0**-23


def _stretched(s: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)
