"""Tables and figures of README and docs, rendered from experiments/results."""
