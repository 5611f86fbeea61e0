"""What the bits of a model come to, and what a change of them would do."""
