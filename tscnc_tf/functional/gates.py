"""The hard concrete distribution: gates in [0, 1] that can be exactly 0, and yet be learnt."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from tscnc_tf import _checks

BETA = 2.0 / 3.0  # the temperature
GAMMA, ZETA = -0.1, 1.1  # the interval that (0, 1) is stretched to before it is clipped

# A uniform number is kept this far from 0 and 1, where its logit is infinite; 1 - 2^-24 is the
# largest float32 below 1.
_MARGIN = 2.0**-24
_PHILOX = tf.random.Algorithm.PHILOX.value


def hard_concrete(log_alpha: Any, uniform: Any) -> tf.Tensor:
    r"""Return gates that are hard concrete distributed, made of uniform random numbers.

    .. math::
        s = \sigma\left(\frac{\log u - \log(1-u) + \log\alpha}{\beta}\right), \qquad
        z = \min(1, \max(0, s(\zeta - \gamma) + \gamma))

    with :math:`\beta = 2/3, \gamma = -0.1, \zeta = 1.1`. A gate is exactly 0 or exactly 1 with
    positive probability, and else has a gradient with respect to :math:`\log\alpha`.

    Args:
        log_alpha: the location of each gate, a tensor of any shape.
        uniform: draws from U(0, 1), of a shape that broadcasts with `log_alpha`. Numbers nearer to
            0 or 1 than 2^-24 count as that far away.

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
    r"""Return the gates of inference, which are not random.

    .. math:: z = \min(1, \max(0, \sigma(\log\alpha)(\zeta - \gamma) + \gamma))

    They are 0 for :math:`\log\alpha \le -\log 11`, and 1 from :math:`\log 11` on. It is an estimate
    of the gate's mean, not the mean itself.

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

    Its sum is the expected number of open gates, the expected L0 norm, and has a gradient
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
    """Return random numbers from U(0, 1), the same ones in eager code, in graphs and under XLA.

    `tf.random.stateless_uniform` won't do: XLA makes a key of the seed in another way than the rest
    of TensorFlow. The Philox generator itself agrees, given its key and its counter.

    Args:
        count: how many.
        seed: names the stream of random numbers, >= 0; possibly a tensor.
        draw: the number of the draw from the stream, >= 0; possibly a tensor.

    Returns:
        A float32 vector of odd multiples of 2^-24, never 0 or 1.

    Reference:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", for Philox.
    """
    key = tf.reshape(tf.cast(seed, tf.uint64), (1,))
    # The lower half of the counter runs over the numbers of one draw.
    counter = tf.stack([tf.zeros((), tf.uint64), tf.cast(draw, tf.uint64)])
    bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[count], key=key, counter=counter, alg=_PHILOX, dtype=tf.uint32
    )
    upper = tf.cast(tf.bitwise.right_shift(bits, tf.constant(9, tf.uint32)), tf.float32)
    return (upper + 0.5) * 2.0**-23


def _stretched(s: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)
