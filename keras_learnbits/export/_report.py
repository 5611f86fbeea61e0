"""`ExportReport`: how a file stores each kernel, and in which arithmetic it is used."""

from keras_learnbits.tables import aligned_table


class ExportReport:
    """How an exporter stored each quantized kernel; prints as an aligned table.

    Attributes:
        rows: List of tuples: name of the kernel, its bits, the type that the file stores, the
            arithmetic of its layer (`"int8"` or `"float32"`), and a note.
        size: Bytes of the file.
    """

    def __init__(self, rows, size):
        self.rows = rows
        self.size = size

    def __str__(self):
        body = [
            (name, str(bits), stored, arithmetic, note)
            for name, bits, stored, arithmetic, note in self.rows
        ]
        head = ("layer", "bits", "stored as", "arithmetic", "note")
        return f"{aligned_table([[head], body], left=5)}\n{self.size:,} bytes"

    __repr__ = __str__
