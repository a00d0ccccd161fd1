"""Fixtures for all tests: seeds, small models, no output in the working folder."""

from __future__ import annotations

import ctypes
import gc
import os
import pathlib
import platform

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import TINY
from tensorflow.python.framework import func_graph, ops

import tscnc_tf as tscnc

# The same examples in every run; and a first call, which TensorFlow compiles, may take its time.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tests")

# Two logical devices, for the tests of distribution strategies; before anything touches the CPU.
_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)

# Memory is released after each file, and after a test if it has grown by this many bytes.
_GROWTH = 256 * 2**20
_LIBC = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def pytest_collection_finish():
    """Have the garbage collector pass over what the imports have made, which stays."""
    gc.collect()
    gc.freeze()
    memory.released = memory()


@pytest.fixture(autouse=True)
def seeded():
    """Seed every generator, and drop the global state that Keras keeps between models."""
    if memory() - memory.released > _GROWTH:
        release()
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True, scope="module")
def released():
    """Release the memory that the tests of a file have used."""
    yield
    keras.backend.clear_session()
    tf_keras.backend.clear_session()
    release()


def memory():
    """Return the bytes of this process in memory; 0 where the system does not tell."""
    statm = pathlib.Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def release():
    """Free the memory of earlier tests, which adds up to gigabytes.

    What XLA has compiled, and some more of each compiled function, stays until the process ends.
    """
    gc.unfreeze()  # what refers to a graph must be found
    gc.collect()
    dismantle_unreachable_graphs()
    gc.collect()
    gc.freeze()
    if _LIBC is not None:  # most of what is freed the C library keeps until it is told
        _LIBC.malloc_trim(0)
    memory.released = memory()


def dismantle_unreachable_graphs():
    """Take apart the graphs that only their own operations and tensors refer to.

    Python does not collect the graph of a training step: TensorFlow's C++ objects, which its
    garbage collector can't look into, are part of the cycle. What such a graph calls stays as well.
    """
    graphs = [each for each in gc.get_objects() if isinstance(each, func_graph.FuncGraph)]
    own = (ops.Operation, ops.SymbolicTensor)
    others = [each for each in gc.get_referrers(*graphs) if not isinstance(each, own)]
    others = [each for each in others if each is not graphs]
    held = {id(each) for each in gc.get_referents(*others)}
    for graph in graphs:
        if id(graph) not in held:
            func_graph.dismantle_func_graph(graph)


@pytest.fixture
def rng():
    """A seeded NumPy generator."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a complete experiment by the recipe `helpers.TINY`; not to be changed."""
    folder = tmp_path_factory.mktemp("experiment") / "tiny"
    tscnc.experiments.run(tscnc.experiments.Recipe.from_dict(TINY), folder, progress=False)
    return folder
