"""Objectives of adversaries, and losses of robust training.

The functions take labels first: integers of shape `(batch,)` or `(batch, 1)`, or one-hot or soft
labels of shape `(batch, classes)`. They compute in float32 at least, whatever the dtype of the
logits, and return one value per example, of shape `(batch,)`.

`TRADES`, `Madry`, `MART` and `RSLAD` define the loss of a training step by them.
"""

from tscnc_tf.losses.distillation import RSLAD
from tscnc_tf.losses.robust import MART, TRADES, Madry, RobustLoss
from tscnc_tf.losses.terms import (
    cross_entropy,
    dlr,
    kl_divergence,
    log_odds,
    margin,
    one_hot,
    targeted_dlr,
)

__all__ = [
    "MART",
    "Madry",
    "RSLAD",
    "RobustLoss",
    "TRADES",
    "cross_entropy",
    "dlr",
    "kl_divergence",
    "log_odds",
    "margin",
    "one_hot",
    "targeted_dlr",
]
