"""Post-training quantization of Keras models, from unlabelled data."""
