"""Fixtures for all tests: seeds, small models, no output in the working folder."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from helpers import TINY

import tscnc_tf as tscnc

# The same examples in every run; and a first call, which TensorFlow compiles, may take its time.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tests")

# Two logical devices, for the tests of distribution strategies; before anything touches the CPU.
_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(autouse=True)
def seeded():
    """Seed every generator, and drop the global state that Keras keeps between models."""
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)


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
