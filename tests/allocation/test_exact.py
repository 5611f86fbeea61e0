import itertools

import numpy as np
import pytest

from keras_learnbits.allocation import exact
from keras_learnbits.allocation.exact import allocate, descent, smallest_size


def brute_force(losses, sizes, budget):
    """The least loss over all combinations of choices."""
    layers = range(len(losses))
    return min(
        sum(losses[layer, choice] for layer, choice in zip(layers, choices, strict=True))
        for choices in itertools.product(range(losses.shape[1]), repeat=len(losses))
        if sum(sizes[layer, choice] for layer, choice in zip(layers, choices, strict=True))
        <= budget
    )


def random_problem(rng, case):
    """Losses of any shape, some choices forbidden; sizes proportional to bits or not."""
    layers, choices = rng.integers(1, 6), rng.integers(1, 5)
    losses = rng.normal(size=(layers, choices))
    if case % 2:
        losses = -np.sort(-losses, axis=1)
    losses[rng.random(losses.shape) < 0.15] = np.inf
    losses[np.arange(layers), rng.integers(0, choices, layers)] = rng.normal(size=layers)
    steps = rng.integers(1, 20, losses.shape) if case % 3 else rng.integers(1, 20, (layers, 1))
    sizes = np.cumsum(np.broadcast_to(steps, losses.shape), axis=1)
    low, high = smallest_size(losses, sizes), sizes.max(axis=1).sum()
    return losses, sizes, int(rng.integers(low, high + 2))


@pytest.mark.parametrize("case", range(100))
def test_an_allocation_is_as_good_as_the_best_of_all_combinations(case):
    losses, sizes, budget = random_problem(np.random.default_rng(case), case)
    choices = allocate(losses, sizes, budget)
    layers = np.arange(len(losses))
    assert sizes[layers, choices].sum() <= budget
    np.testing.assert_allclose(losses[layers, choices].sum(), brute_force(losses, sizes, budget))


def test_a_hundred_layers_fill_their_budget():
    rng = np.random.default_rng(0)
    weights = (10 ** rng.uniform(3, 6.5, 100)).astype(int)
    sizes = weights[:, None] * np.arange(1, 9)
    losses = (rng.random(100) * weights**0.7)[:, None] * 4.0 ** -np.arange(1, 9)
    budget = int(2.3 * weights.sum())
    choices = allocate(losses, sizes, budget)
    spare = budget - sizes[np.arange(100), choices].sum()
    assert 0 <= spare < weights[choices < 7].min()


def test_with_few_states_an_allocation_is_within_budget_and_no_worse_than_the_descent(monkeypatch):
    monkeypatch.setattr(exact, "MOST_STATES", 2)
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 1000, 20)[:, None] * np.arange(1, 9)
    losses = rng.random((20, 1)) * 4.0 ** -np.arange(1, 9)
    budget = int(sizes[:, 3].sum())
    layers = np.arange(20)
    choices = allocate(losses, sizes, budget)
    assert sizes[layers, choices].sum() <= budget
    _, path = descent(losses, sizes)
    within = path[sizes[layers, path].sum(axis=1) <= budget][0]
    assert losses[layers, choices].sum() <= losses[layers, within].sum()


def test_a_budget_below_the_smallest_size_is_refused():
    with pytest.raises(ValueError, match="Received: budget=3, smallest=4"):
        allocate(np.zeros((2, 2)), np.array([[2, 3], [2, 3]]), 3)


def test_each_allocation_of_the_descent_is_the_best_at_its_price():
    rng = np.random.default_rng(2)
    losses = -np.sort(-rng.random((4, 6)), axis=1)
    costs = np.cumsum(rng.integers(1, 9, (4, 6)), axis=1).astype(float)
    prices, choices = descent(losses, costs)
    assert (np.diff(prices) >= 0).all()
    for price, chosen in zip((prices[:-1] + prices[1:]) / 2, choices[:-1], strict=True):
        total = losses + price * costs
        np.testing.assert_allclose(total[np.arange(4), chosen], total.min(axis=1))
