"""Pure tensor maths: kernels as matrices, the two constraints, balls. Knows no Keras."""

from tscnc_tf.functional.balls import lengths, project, random_start, steepest_ascent
from tscnc_tf.functional.constraints import (
    authors_penalty,
    log_ratio,
    orthogonality,
    transformed_l1,
)
from tscnc_tf.functional.kernels import canonical, group_norms, matrices

__all__ = [
    "authors_penalty",
    "canonical",
    "group_norms",
    "lengths",
    "log_ratio",
    "matrices",
    "orthogonality",
    "project",
    "random_start",
    "steepest_ascent",
    "transformed_l1",
]
