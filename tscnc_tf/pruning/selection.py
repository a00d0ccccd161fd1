"""Which layers a verb is meant for: the rule that verbs of all rooms share."""

from tscnc_tf._keras.selection import selector

__all__ = ["selector"]
