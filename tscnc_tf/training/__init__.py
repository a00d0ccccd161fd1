"""Adversarial training: a Keras model around the user's model, AWP, and SGD with L2 decay."""

from tscnc_tf.training.perturbation import AWP
from tscnc_tf.training.sgd import SGDWithL2
from tscnc_tf.training.trainer import AdversarialTraining

__all__ = ["AWP", "AdversarialTraining", "SGDWithL2"]
