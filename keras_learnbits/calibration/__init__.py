"""What example inputs say about a model: how far outputs move, and how to round for them."""
