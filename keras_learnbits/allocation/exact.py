"""Integer bit-widths under a budget: a multiple-choice knapsack problem, solved exactly.

Each layer takes one of several choices. Tables have one row per layer and one column per choice;
`inf` in `losses` forbids a choice.
"""

import numpy as np

# Number of partial solutions that are kept, about 100 MB with the temporary arrays.
MOST_STATES = 1_000_000


def descent(losses, costs):
    """The allocations that minimize `sum losses + price * sum costs`, from price 0 upwards.

    Each differs from the one before in a single layer. That layer moves along the lower convex hull
    of its losses over costs to the next cheaper choice, at the price at which the move pays off.

    Args:
        losses: NumPy array of shape `(layers, choices)`.
        costs: NumPy array of shape `(layers, choices)`.

    Returns:
        Prices of shape `(steps + 1,)`, ascending from 0, and choices of shape
        `(steps + 1, layers)`.

    Examples:
        >>> losses, costs = np.array([[8.0, 2.0, 0.0]]), np.array([[1.0, 2.0, 3.0]])
        >>> prices, choices = descent(losses, costs)
        >>> prices.tolist(), choices.tolist()
        ([0.0, 2.0, 6.0], [[2], [1], [0]])
    """
    start = np.array([_first(loss, cost) for loss, cost in zip(losses, costs, strict=True)])
    steps = []
    for layer, choice in enumerate(start):
        while (step := _next(losses[layer], costs[layer], choice)) is not None:
            price, choice = step
            steps.append((price, layer, choice))
    steps.sort(key=lambda step: step[0])  # stable: within a layer prices ascend
    choices = [start]
    for _, layer, choice in steps:
        choices.append(choices[-1].copy())
        choices[-1][layer] = choice
    return np.array([0.0, *(price for price, _, _ in steps)]), np.array(choices)


def _first(losses, costs):
    """The choice with the least loss; the cheapest one of several."""
    return np.lexsort((costs, losses))[0]  # the last key is the primary one


def _next(losses, costs, choice):
    """The price at which the next choice on the convex hull pays off, and that choice.

    None if no cheaper choice is allowed.
    """
    cheaper = np.flatnonzero(np.isfinite(losses) & (costs < costs[choice]))
    if not len(cheaper):
        return None
    # The hull's next corner is the cheaper choice with the least loss per saved cost.
    prices = (losses[cheaper] - losses[choice]) / (costs[choice] - costs[cheaper])
    best = np.lexsort((costs[cheaper], prices))[0]
    return prices[best], cheaper[best]


def allocate(losses, sizes, budget):
    """The choices with the least total loss whose total size is within a budget.

    The result is exact, even for hundreds of layers. The Lagrangian relaxation gives a feasible
    solution and a lower bound of the loss. Choices and partial solutions that exceed the bound by
    more than the feasible solution cannot be optimal and are dropped. Dynamic programming over the
    layers solves the rest. Only if more than `MOST_STATES` partial solutions remain, the least
    promising ones are dropped; the result is then at most this gap worse than the optimum.

    Args:
        losses: NumPy array of shape `(layers, choices)`.
        sizes: NumPy array of integers, of shape `(layers, choices)`.
        budget: Largest total size, inclusive.

    Returns:
        NumPy array with one choice per layer.

    Raises:
        ValueError: Even the smallest choices exceed the budget.

    Examples:
        >>> losses, sizes = np.array([[9.0, 0.0], [5.0, 0.0]]), np.array([[1, 3], [1, 3]])
        >>> allocate(losses, sizes, budget=5).tolist()
        [1, 0]
    """
    smallest = smallest_size(losses, sizes)
    if smallest > budget:
        raise ValueError(
            "The budget must be at least the smallest feasible size. "
            f"Received: budget={budget}, smallest={smallest}"
        )
    prices, choices = descent(losses, sizes)
    layers = np.arange(len(losses))
    within = np.flatnonzero(sizes[layers, choices].sum(axis=1) <= budget)
    if within[0] == 0:
        return choices[0]
    # By weak duality, at any price the minimum of `loss + price * (size - budget)` over all choices
    # is a lower bound of the loss. `excess` is what a single choice adds to that minimum.
    price = prices[within[0]]
    feasible = _filled(losses, sizes, budget, choices[within[0]])
    relaxed = losses + price * sizes
    excess = relaxed - relaxed.min(axis=1, keepdims=True)
    bound = relaxed.min(axis=1).sum() - price * budget
    gap = losses[layers, feasible].sum() - bound
    # The feasible solution's own excess is the gap, up to rounding.
    rounding = 1e-12 * (np.abs(bound) + price * budget)
    best = _best_within(losses, sizes, budget, excess, gap + rounding)
    return min(feasible, best, key=lambda each: losses[layers, each].sum())


def _filled(losses, sizes, budget, choices):
    """Spends the rest of a budget greedily on the choices that lower the loss most."""
    choices, layers = choices.copy(), np.arange(len(losses))
    while True:
        spare = budget - sizes[layers, choices].sum()
        gains = losses[layers, choices][:, None] - losses
        gains = np.where(sizes - sizes[layers, choices][:, None] <= spare, gains, 0.0)
        layer, choice = np.unravel_index(np.argmax(gains), gains.shape)
        if gains[layer, choice] <= 0:
            return choices
        choices[layer] = choice


def smallest_size(losses, sizes):
    """The total size of the smallest allowed choices.

    Examples:
        >>> smallest_size(np.array([[np.inf, 0.0]]), np.array([[1, 3]]))
        3
    """
    return int(np.where(np.isfinite(losses), sizes, np.iinfo(np.int64).max).min(axis=1).sum())


def _best_within(losses, sizes, budget, excess, gap):
    """Dynamic programming over layers, on choices whose `excess` sums to at most `gap`.

    A state is a choice for each layer so far: its size, its loss, and its excess over the bound.
    """
    smallest = np.where(np.isfinite(losses), sizes, np.iinfo(np.int64).max).min(axis=1)
    # Smallest total size of the layers after each one.
    still_needed = np.append(np.cumsum(smallest[::-1])[::-1], 0)[1:]
    size, loss, over = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    history = []
    for layer, needed in enumerate(still_needed):
        options = np.flatnonzero(excess[layer] <= gap)
        # Every state is continued with every option.
        parents, picks = np.divmod(np.arange(len(size) * len(options)), len(options))
        picks = options[picks]
        size = size[parents] + sizes[layer, picks]
        loss = loss[parents] + losses[layer, picks]
        over = over[parents] + excess[layer, picks]
        keep = np.flatnonzero((size + needed <= budget) & (over <= gap))
        keep = keep[np.lexsort((loss[keep], size[keep]))]
        # A state is dominated by another one that is not larger and does not have more loss.
        best_before = np.minimum.accumulate(np.append(np.inf, loss[keep][:-1]))
        keep = keep[loss[keep] < best_before]
        if len(keep) > MOST_STATES:
            keep = np.sort(keep[np.argsort(over[keep])[:MOST_STATES]])
        size, loss, over = size[keep], loss[keep], over[keep]
        history.append((parents[keep], picks[keep]))
    # The choices of the best state, from the last layer back to the first.
    state = int(np.argmin(loss))
    choices = []
    for parents, picks in reversed(history):
        choices.append(picks[state])
        state = parents[state]
    return np.array(choices[::-1])
