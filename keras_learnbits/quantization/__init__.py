"""Post-training quantization: a Keras model and unlabelled data to a small model."""
