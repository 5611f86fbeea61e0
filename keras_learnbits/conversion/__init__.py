"""Conversion of Keras models to learned bits, and back."""
