r"""Hard-concrete gates: whole filters and input units that training can switch off.

How many groups of weights a network uses is a count, and a count has no gradient. The gates smooth
it. Each group g, a filter of a convolution or an input unit of a dense layer, is multiplied by a
random gate :math:`z_g \in [0, 1]`, which is exactly 0 with a probability that depends smoothly on
one number, :math:`\log\alpha_g`. The loss is an expectation over gates, and so is the number of
open ones, :math:`\sum_g p_g` with :math:`p_g = P(z_g \ne 0)`: both can be descended. In training,
each step draws the gates once, for the whole batch: groups whose gate is undecided are switched off
at random, as by dropout. At inference a gate is a fixed
number, and 0 once :math:`\log\alpha_g \le -\log 11`. The penalty

.. math::
    \text{sparsity\_factor} \cdot \sum_g T_a(p_g u_g), \qquad
    u_g = \tfrac12\,\text{weight\_decay}\,\|w_g\|^2 + \text{l0\_factor}\,|g|

is the transformed l1 of the expected cost of a group. Its slope falls as costs grow beyond `a`, so
the gradient is largest for groups of little cost. (With the defaults
all costs are far below `a`, and the penalty is nearly proportional to them.)

Batch normalisation in training divides the output of a filter by its deviation over the batch, and
a gate, which is the same for the whole batch, with it. So before it the loss on the data hardly
depends on how far a gate is open, only on whether it is 0: the gradient of the data at
:math:`\log\alpha` is nearly 0 in most draws, and large in rare draws near 0 (docs/theory.md, T20).
In a training of some hundred steps, gates there follow the penalty, and act as a dropout of
filters. On the inputs of dense layers, and where no batch normalisation follows, the data act on
the gates in every draw.

`add_gates` puts gates into a model, training does the rest, `report` says how far it has come, and
`fold` multiplies them into the weights: what is left is a plain model whose closed filters are
zero, for `pruning.compact` to take out.

Reference:
    Louizos, Welling & Kingma 2018, arXiv 1712.01312 (hard concrete gates); Ma et al. 2019,
    arXiv 1901.01021 (transformed l1); TSCNC, arXiv 2503.20454 (the two together).
"""

from tscnc_tf.gates.api import add_gates, fold
from tscnc_tf.gates.layer import Gated
from tscnc_tf.gates.status import GateReport, GateStatus, report

__all__ = ["GateReport", "GateStatus", "Gated", "add_gates", "fold", "report"]
