"""Verbs on models: attach regularizers, prune, strip."""

from tscnc_tf.pruning.regularize import add_regularizers
from tscnc_tf.pruning.wrap import PruningReport, prune, prune_scope, report, strip

__all__ = ["PruningReport", "add_regularizers", "prune", "prune_scope", "report", "strip"]
