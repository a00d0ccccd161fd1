"""Adversaries: frozen dataclasses that are called as `attack(model, x, y) -> x_adv`.

`FGSM` and `PGD` follow the gradient of the network; `Custom` brings in an attack of another
library. All keep to a ball around x and to the inputs' bounds.
"""

from tscnc_tf.attacks._base import Attack
from tscnc_tf.attacks._gradient import GradientAttack
from tscnc_tf.attacks.custom import Custom
from tscnc_tf.attacks.gradient import FGSM, PGD

__all__ = ["Attack", "Custom", "FGSM", "GradientAttack", "PGD"]
