"""Channel analysis of networks: the graph, its operations on channels, and the paths through them.

`graph` unrolls a model into calls, `layers` translates each call into `operations`, and `paths`
counts the weights on paths from inputs to outputs. Compaction uses the same analysis.
"""

from tscnc_tf._channels.paths import NotFollowedError, weights_on_paths

__all__ = ["NotFollowedError", "weights_on_paths"]
