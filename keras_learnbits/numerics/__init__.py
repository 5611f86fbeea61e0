"""Grids, rounding with closed-form gradients, and loops compiled by XLA."""
