"""Pure tensor maths: kernels as matrices, the two constraints, masks, balls. Knows no Keras."""

from tscnc_tf.functional.balls import lengths, project, random_start, steepest_ascent
from tscnc_tf.functional.constraints import (
    authors_penalty,
    log_ratio,
    orthogonality,
    transformed_l1,
)
from tscnc_tf.functional.kernels import canonical, group_norms, matrices, restore
from tscnc_tf.functional.masks import kept_count, largest, largest_per_row, largest_within

__all__ = [
    "authors_penalty",
    "canonical",
    "group_norms",
    "kept_count",
    "largest",
    "largest_per_row",
    "largest_within",
    "lengths",
    "log_ratio",
    "matrices",
    "orthogonality",
    "project",
    "random_start",
    "restore",
    "steepest_ascent",
    "transformed_l1",
]
