"""Reading a model without changing it: zeros, spectra, Lipschitz estimates."""

from tscnc_tf.inspection.lipschitz import LipschitzReport, local_lipschitz
from tscnc_tf.inspection.operators import operator_singular_values
from tscnc_tf.inspection.spectra import (
    ConditionReport,
    KernelCondition,
    condition_numbers,
    singular_values,
)
from tscnc_tf.inspection.zeros import SparsityReport, WeightSparsity, sparsity

__all__ = [
    "ConditionReport",
    "KernelCondition",
    "LipschitzReport",
    "SparsityReport",
    "WeightSparsity",
    "condition_numbers",
    "local_lipschitz",
    "operator_singular_values",
    "singular_values",
    "sparsity",
]
