"""`FitPlan`: state that the callbacks of one `fit` share."""


class FitPlan:
    """State that the callbacks of one `fit` share; `fit` makes it and deletes it at the end.

    Args:
        model: The model in training.

    Attributes:
        found_frozen: Whether the bits were frozen when `fit` began, or when a callback restored a
            checkpoint.
        budget: The `BitBudget` among the callbacks, or None.
    """

    def __init__(self, model):
        self._model = model
        self.found_frozen = model.compiled and model.bits_are_frozen
        self.budget = None

    def unfreeze(self):
        """Unfreezes the bits, and notes whether a callback has restored frozen ones."""
        self.found_frozen = self.found_frozen or self._model.bits_are_frozen
        self._model.unfreeze_bits()

    def allocate(self):
        """The bit-widths to freeze: dictionary of `QuantizedTensor` to integer."""
        if self.budget is not None:
            return self.budget.allocate()
        return self._model.cheapest_integers()

    def permits_present_widths(self):
        """Whether the budget, if there is one, permits the current bit-widths."""
        return self.budget is None or self.budget.keep()
