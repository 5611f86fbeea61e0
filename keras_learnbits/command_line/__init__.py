"""The command line: `python -m keras_learnbits quantize` and `show`."""
