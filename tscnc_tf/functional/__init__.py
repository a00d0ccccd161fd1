"""Tensor functions without Keras: kernels as matrices, both constraints, masks, gates, balls."""

from tscnc_tf.functional.balls import lengths, project, random_start, steepest_ascent
from tscnc_tf.functional.constraints import (
    authors_penalty,
    log_ratio,
    orthogonality,
    transformed_l1,
)
from tscnc_tf.functional.gates import deterministic_gate, hard_concrete, open_probability
from tscnc_tf.functional.kernels import canonical, group_norms, matrices, restore
from tscnc_tf.functional.masks import (
    kept_count,
    largest,
    largest_per_row,
    largest_share,
    largest_within,
)

__all__ = [
    "authors_penalty",
    "canonical",
    "deterministic_gate",
    "group_norms",
    "hard_concrete",
    "kept_count",
    "largest",
    "largest_per_row",
    "largest_share",
    "largest_within",
    "lengths",
    "log_ratio",
    "matrices",
    "open_probability",
    "orthogonality",
    "project",
    "random_start",
    "restore",
    "steepest_ascent",
    "transformed_l1",
]
