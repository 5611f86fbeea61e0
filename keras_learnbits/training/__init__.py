"""Models that learn their bit-widths in `fit`."""
