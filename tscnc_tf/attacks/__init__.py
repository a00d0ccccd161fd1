"""Attacks: frozen dataclasses that are called as `attack(model, x, y) -> x_adv`.

`FGSM`, `PGD` and `APGD` follow the gradient of the network, `FAB` searches for the nearest
adversarial example, and `Square` uses outputs only. `AutoAttack`, the standard evaluation of the
field, is the ensemble of `APGD`, `FAB` and `Square`. `CleverHans` runs the attacks of that library,
`Custom` any function, such as an attack of another library, and `Transfer` an attack on another
model. Results lie in a ball around x and within the inputs' bounds.
"""

from tscnc_tf.attacks.apgd import APGD
from tscnc_tf.attacks.autoattack import AutoAttack
from tscnc_tf.attacks.base import Attack
from tscnc_tf.attacks.cleverhans import CleverHans
from tscnc_tf.attacks.custom import Custom
from tscnc_tf.attacks.fab import FAB
from tscnc_tf.attacks.pgd import FGSM, PGD, GradientAttack
from tscnc_tf.attacks.square import Square
from tscnc_tf.attacks.transfer import Transfer

__all__ = [
    "APGD",
    "Attack",
    "AutoAttack",
    "CleverHans",
    "Custom",
    "FAB",
    "FGSM",
    "GradientAttack",
    "PGD",
    "Square",
    "Transfer",
]
