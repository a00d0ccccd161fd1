"""What zeros are worth in time: layers as they are, without zeros, and with sparse products."""

from tscnc_tf._timing import Times
from tscnc_tf.inspection.speed.check import speed_check
from tscnc_tf.inspection.speed.report import LayerSpeed, SpeedReport
from tscnc_tf.inspection.speed.structure import KernelStructure

__all__ = ["KernelStructure", "LayerSpeed", "SpeedReport", "Times", "speed_check"]
