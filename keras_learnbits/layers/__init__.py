"""The learned-bit layers, one file a family, and what they share in `base`."""
