"""Data for training and evaluation: public data sets by name, and a user's own files by path.

`load` reads, checks and splits the data. The `Dataset` that it returns provides training batches,
which are reproduced bit for bit when a run is resumed, and arrays for evaluation. With
`stream=True` images stay in their files until they are needed.
"""

from tscnc_tf.datasets.dataset import Dataset
from tscnc_tf.datasets.images import StoredImages
from tscnc_tf.datasets.load import load

__all__ = ["Dataset", "StoredImages", "load"]
