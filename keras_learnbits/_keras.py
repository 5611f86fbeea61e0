"""Every reliance on unwritten behaviour of Keras 3.15 or TensorFlow 2.21, one function each."""
