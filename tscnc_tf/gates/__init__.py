r"""Hard-concrete gates: whole filters and input units that training can switch off.

How many groups of weights a network uses is a count, and a count has no gradient. The gates smooth
it. Each group g, a filter of a convolution or an input unit of a dense layer, is multiplied by a
random gate :math:`z_g \in [0, 1]`, which is exactly 0 with a probability that depends smoothly on
one number, :math:`\log\alpha_g`. The loss is an expectation over gates, and so is the number of
open ones, :math:`\sum_g p_g` with :math:`p_g = P(z_g \ne 0)`: both can be descended. In training,
each step draws the gates once, for the whole batch; what is uncertain of its use is switched off
now and then, as by dropout, so the others learn to do without it. At inference a gate is a fixed
number, and 0 once :math:`\log\alpha_g \le -\log 11`. The penalty

.. math::
    \text{sparsity\_factor} \cdot \sum_g T_a(p_g u_g), \qquad
    u_g = \tfrac12\,\text{weight\_decay}\,\|w_g\|^2 + \text{l0\_factor}\,|g|

bends the expected cost of a group by the transformed l1, whose slope falls as costs grow beyond
`a`: it presses on groups that cost little, and hardly on those that cost much. (With the defaults
all costs are far below `a`, and the penalty is nearly proportional to them.)

Batch normalisation in training divides the output of a filter by its deviation over the batch, and
a gate, which is the same for the whole batch, with it. So before it the loss on the data hardly
depends on how far a gate is open, only on whether it is 0: nearly every draw tells
:math:`\log\alpha` nothing, and what the data have to say comes in rare draws near 0 with large
gradients (docs/theory.md, T20). In a training of some hundred steps, gates there follow the
penalty, and act as a dropout of filters. On the inputs of dense layers, and where no batch
normalisation follows, the data have their say in every draw.

`add_gates` puts gates into a model, training does the rest, `report` says how far it has come, and
`fold` multiplies them into the weights: what is left is a plain model whose closed filters are
zero, for `pruning.compact` to take out.

Reference:
    Louizos, Welling & Kingma 2018, arXiv 1712.01312 (hard concrete gates); Ma et al. 2019,
    arXiv 1901.01021 (transformed l1); TSCNC, arXiv 2503.20454 (the two together).
"""

from tscnc_tf.gates.layer import Gated
from tscnc_tf.gates.status import GateReport, GateStatus, report
from tscnc_tf.gates.verbs import add_gates, fold

__all__ = ["GateReport", "GateStatus", "Gated", "add_gates", "fold", "report"]
