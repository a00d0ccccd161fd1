"""A network as operations on channels: its graph, what each layer does, and which paths there are.

`graph` unrolls a model into calls, `layers` reads each call as `operations`, and `paths` says which
weights are on a path from the inputs to the outputs. Compaction removes channels by the same.
"""

from tscnc_tf._channels.paths import NotFollowedError, weights_on_paths

__all__ = ["NotFollowedError", "weights_on_paths"]
