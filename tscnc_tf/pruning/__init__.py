"""Attach regularizers to a model, prune it, freeze its masks, strip it; and the pruners."""

from tscnc_tf.pruning.api import freeze_mask, prune, prune_now, prune_scope, strip
from tscnc_tf.pruning.budgets import condition_budgets
from tscnc_tf.pruning.compaction import Compaction, compact
from tscnc_tf.pruning.learned import Learned
from tscnc_tf.pruning.pruner import Pruner
from tscnc_tf.pruning.recalibrate import recalibrate
from tscnc_tf.pruning.regrowth import Regrowth
from tscnc_tf.pruning.regularize import add_regularizers
from tscnc_tf.pruning.score_pruner import ScorePruner
from tscnc_tf.pruning.selection import Magnitude
from tscnc_tf.pruning.status import PruningReport, report
from tscnc_tf.pruning.structures import NM, Block, Filters, Unstructured
from tscnc_tf.pruning.taylor import Taylor

__all__ = [
    "Block",
    "Compaction",
    "Filters",
    "Learned",
    "Magnitude",
    "NM",
    "Pruner",
    "PruningReport",
    "Regrowth",
    "ScorePruner",
    "Taylor",
    "Unstructured",
    "add_regularizers",
    "compact",
    "condition_budgets",
    "freeze_mask",
    "prune",
    "prune_now",
    "prune_scope",
    "recalibrate",
    "report",
    "strip",
]
