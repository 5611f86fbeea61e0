"""Estimators of how the loss changes with each bit-width."""
