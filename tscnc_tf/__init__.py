"""tscnc_tf: networks that are both tiny and hard to fool, for Keras and TensorFlow."""
