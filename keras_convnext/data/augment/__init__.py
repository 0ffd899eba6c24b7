"""Training augmentation in tf.data, equal to the published code."""
