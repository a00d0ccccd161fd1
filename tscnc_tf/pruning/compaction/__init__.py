"""Remove from a network what pruning has made dead, so that it is smaller and faster as it is."""

from tscnc_tf._timing import Latency
from tscnc_tf.pruning.compaction.api import compact
from tscnc_tf.pruning.compaction.report import Compaction, Kept, LayerChange, LeftAlone

__all__ = ["Compaction", "Kept", "Latency", "LayerChange", "LeftAlone", "compact"]
