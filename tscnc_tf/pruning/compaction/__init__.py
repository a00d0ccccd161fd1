"""Remove the dead channels of a pruned network, so that it is smaller and faster."""

from tscnc_tf._timing import Latency
from tscnc_tf.pruning.compaction.api import compact
from tscnc_tf.pruning.compaction.report import Compaction, Kept, LayerChange, LeftAlone

__all__ = ["Compaction", "Kept", "Latency", "LayerChange", "LeftAlone", "compact"]
