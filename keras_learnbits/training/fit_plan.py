"""`FitPlan`: what the callbacks of one `fit` share."""


class FitPlan:
    """The plan of one `fit` for the bits. `fit` makes it, and drops it when it ends or raises.

    Args:
        model: The model in training.

    Attributes:
        found_frozen: Whether the bits were frozen when `fit` began, or were restored so.
        budget: The `BitBudget` among the callbacks, or None.
    """

    def __init__(self, model):
        self._model = model
        self.found_frozen = model.compiled and model.bits_are_frozen
        self.budget = None

    def unfreeze(self):
        """Lets the bits move, and notes whether a callback has restored frozen ones."""
        self.found_frozen = self.found_frozen or self._model.bits_are_frozen
        self._model.unfreeze_bits()

    def allocate(self):
        """The integer bit-widths to freeze at: dictionary of `QuantizedTensor` to integer."""
        if self.budget is not None:
            return self.budget.allocate()
        return self._model.cheapest_integers()

    def permits_present_widths(self):
        """Whether the budget, if there is one, permits the bit-widths in use."""
        return self.budget is None or self.budget.keep()
