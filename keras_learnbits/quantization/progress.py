"""Progress of a long call, in phases."""

import keras


class Progress:
    """Prints the phases of a call, each with a progress bar.

    Args:
        verbose: 0 for no output, 1 or `"auto"` for progress bars, 2 for one line per phase.
    """

    def __init__(self, verbose):
        if verbose not in ("auto", 0, 1, 2):
            raise ValueError(f"`verbose` must be 'auto', 0, 1 or 2. Received: verbose={verbose!r}")
        self.verbose = 1 if verbose == "auto" else int(verbose)

    def phase(self, name, steps, unit):
        """Begins a phase.

        Args:
            name: Name of the phase.
            steps: Number of steps.
            unit: Name of one step, for the bar.

        Returns:
            Function to be called after each step, with the names and values to show.
        """
        if not self.verbose or not steps:
            return lambda **values: None
        print(f"{name}: {steps} {unit}{'s' * (steps != 1)}", flush=True)
        bar = keras.utils.Progbar(steps, verbose=self.verbose, unit_name=unit)
        return lambda **values: bar.add(1, [(k, float(v)) for k, v in values.items()])

    def line(self, text):
        """Prints a line."""
        if self.verbose:
            print(text, flush=True)
