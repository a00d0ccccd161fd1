"""Adversaries: frozen dataclasses that are called as `attack(model, x, y) -> x_adv`.

`FGSM` and `PGD` follow the gradient of the network; `CleverHans` runs the attacks of that library,
`Custom` any function, such as an attack of another library, and `Transfer` an attack on another
model. All keep to a ball around x and to the inputs' bounds.
"""

from tscnc_tf.attacks.base import Attack
from tscnc_tf.attacks.cleverhans import CleverHans
from tscnc_tf.attacks.custom import Custom
from tscnc_tf.attacks.pgd import FGSM, PGD, GradientAttack
from tscnc_tf.attacks.transfer import Transfer

__all__ = ["Attack", "CleverHans", "Custom", "FGSM", "GradientAttack", "PGD", "Transfer"]
