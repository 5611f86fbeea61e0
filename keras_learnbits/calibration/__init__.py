"""Calibration on example inputs: changes of the outputs, and rounding that compensates them."""
