"""Data to train and judge on: known sets by name, and a user's own files by their path.

`load` reads, checks and splits; the `Dataset` that it returns gives training batches that a stopped
run can go on with bit for bit, and arrays to judge on. With `stream=True` the images stay in their
files.
"""

from tscnc_tf.datasets.dataset import Dataset
from tscnc_tf.datasets.images import StoredImages
from tscnc_tf.datasets.load import load

__all__ = ["Dataset", "StoredImages", "load"]
