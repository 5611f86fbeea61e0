"""The bits of a model as a table, and measurements at other bit-widths."""
