"""Bit-widths of all layers for a target: its kinds, and the exact allocation."""
