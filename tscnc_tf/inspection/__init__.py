"""Inspection of a model without changing it: zeros, sizes, speed, spectra, Lipschitz constants."""

from tscnc_tf._timing import Times
from tscnc_tf.inspection.lipschitz import (
    LipschitzReport,
    lipschitz_upper_bound,
    local_lipschitz,
)
from tscnc_tf.inspection.operators import operator_singular_values
from tscnc_tf.inspection.sizes import KernelSize, SizeReport, sizes
from tscnc_tf.inspection.spectra import (
    ConditionReport,
    KernelCondition,
    condition_numbers,
    singular_values,
)
from tscnc_tf.inspection.speed import LayerSpeed, SpeedReport, speed_check
from tscnc_tf.inspection.structure import KernelStructure
from tscnc_tf.inspection.zeros import SparsityReport, WeightSparsity, sparsity

__all__ = [
    "ConditionReport",
    "KernelCondition",
    "KernelSize",
    "KernelStructure",
    "LayerSpeed",
    "LipschitzReport",
    "SizeReport",
    "SparsityReport",
    "SpeedReport",
    "Times",
    "WeightSparsity",
    "condition_numbers",
    "lipschitz_upper_bound",
    "local_lipschitz",
    "operator_singular_values",
    "singular_values",
    "sizes",
    "sparsity",
    "speed_check",
]
