"""Verbs on models: attach regularizers, prune, keep zeros, strip; and the engine behind them."""

from tscnc_tf.pruning.budgets import condition_budgets
from tscnc_tf.pruning.compaction import Compaction, compact
from tscnc_tf.pruning.criteria import Magnitude
from tscnc_tf.pruning.engine import Pruner
from tscnc_tf.pruning.regularize import add_regularizers
from tscnc_tf.pruning.scores import ScorePruner
from tscnc_tf.pruning.status import PruningReport, report
from tscnc_tf.pruning.structures import NM, Block, Filters, Unstructured
from tscnc_tf.pruning.verbs import freeze_mask, prune, prune_now, prune_scope, strip

__all__ = [
    "Block",
    "Compaction",
    "Filters",
    "Magnitude",
    "NM",
    "Pruner",
    "PruningReport",
    "ScorePruner",
    "Unstructured",
    "add_regularizers",
    "compact",
    "condition_budgets",
    "freeze_mask",
    "prune",
    "prune_now",
    "prune_scope",
    "report",
    "strip",
]
