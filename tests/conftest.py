"""Fixtures for all tests: seeds, small models, no output in the working folder."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

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
