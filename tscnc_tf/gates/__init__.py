r"""Hard-concrete gates: training can switch off whole filters and input units.

The number of groups of weights that a network uses has no gradient. Gates make it differentiable.
Each group g, a filter of a convolution or an input unit of a dense layer, is multiplied by a random
gate :math:`z_g \in [0, 1]`, which is exactly 0 with a probability that depends smoothly on a
parameter :math:`\log\alpha_g`. Then the loss and the number of open gates are expectations over the
gates, the latter :math:`\sum_g p_g` with :math:`p_g = P(z_g \ne 0)`, and both have gradients. In
training, each step draws the gates once for the whole batch: groups whose gate is undecided are
switched off at random, as by dropout. At inference a gate is a fixed number, and 0 if
:math:`\log\alpha_g \le -\log 11`. The penalty

.. math::
    \text{sparsity\_factor} \cdot \sum_g T_a(p_g u_g), \qquad
    u_g = \tfrac12\,\text{weight\_decay}\,\|w_g\|^2 + \text{l0\_factor}\,|g|

is the transformed l1 of the expected cost of a group. Its slope decreases for costs beyond `a`, so
the gradient is largest for groups of low cost. (With the defaults all costs are far below `a`, and
the penalty is nearly proportional to them.)

In training, batch normalisation divides the output of a filter by its deviation over the batch.
This cancels a gate, which is the same for the whole batch. So for gates before batch normalisation,
the loss on the data depends almost only on which gates are 0: its gradient at :math:`\log\alpha` is
nearly 0 in most draws, and large in rare draws near 0 (docs/theory.md, T20). In a training of some
hundred steps, such gates follow the penalty, and act as a dropout of filters. For gates on the
inputs of dense layers, and without batch normalisation after them, the gradient of the data is not
cancelled.

`add_gates` puts gates into a model, which is then trained. `report` tells how many gates are open.
`fold` multiplies the gates into the weights: it returns a plain model whose closed filters are
zero, so that `pruning.compact` can remove them.

Reference:
    Louizos, Welling & Kingma 2018, arXiv 1712.01312 (hard concrete gates); Ma et al. 2019,
    arXiv 1901.01021 (transformed l1); TSCNC, arXiv 2503.20454 (the two together).
"""

from tscnc_tf.gates.api import add_gates, fold
from tscnc_tf.gates.layer import Gated
from tscnc_tf.gates.status import GateReport, GateStatus, report

__all__ = ["GateReport", "GateStatus", "Gated", "add_gates", "fold", "report"]
