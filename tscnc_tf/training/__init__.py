"""Adversarial training, as a Keras model around the user's model."""

from tscnc_tf.training.trainer import AdversarialTraining

__all__ = ["AdversarialTraining"]
