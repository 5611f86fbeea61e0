"""The learned-bit layers, one module per family, on the shared module `base`."""
