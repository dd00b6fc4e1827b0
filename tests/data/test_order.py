import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm_core.data.order import BLOCK, Apportionment, BlendOrder, SampleOrder, permute
from calm_core.errors import UserError

seeds = st.integers(0, 2**63)


@given(count=st.integers(1, 3000), seed=seeds, epoch=st.integers(0, 100))
def test_permutation_is_a_bijection(count, seed, epoch):
    image = permute(np.arange(count), count, seed, epoch)
    assert np.array_equal(np.sort(image), np.arange(count))


@given(count=st.integers(2**20, 2**40), seed=seeds, data=st.data())
@settings(max_examples=30)
def test_large_permutation_stays_in_range_and_collides_nowhere(count, seed, data):
    start = data.draw(st.integers(0, count - 1000))
    image = permute(np.arange(start, start + 1000), count, seed, 0)
    assert image.min() >= 0
    assert image.max() < count
    assert len(np.unique(image)) == 1000


def test_permutation_has_no_visible_order():
    count = 100_003
    image = permute(np.arange(count), count, seed=0, epoch=0)
    # Of a random permutation both correlations are about 1/sqrt(count) = 0.003.
    assert abs(np.corrcoef(image, np.arange(count))[0, 1]) < 0.02
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.02
    # Fixed points and kept neighbours are Poisson(1).
    assert np.sum(image == np.arange(count)) < 10
    assert np.sum(np.diff(image) == 1) < 10


def test_every_permutation_of_four_occurs():
    seen = {tuple(permute(np.arange(4), 4, seed, 0)) for seed in range(1000)}
    assert len(seen) == 24


def test_each_epoch_visits_every_window_once_in_another_order():
    order = SampleOrder(count=77, seed=3)
    epochs = order.window(np.arange(77 * 4)).reshape(4, 77)
    assert all(np.array_equal(np.sort(epoch), np.arange(77)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_over_two_epochs_equals_its_samples_one_by_one():
    order = SampleOrder(count=10, seed=1)
    batch = order.window(np.array([[8, 9, 10], [11, 25, 0]]))
    assert batch.tolist() == [[int(order.window(np.array([i]))[0]) for i in row] for row in [[8, 9, 10], [11, 25, 0]]]


def test_order_depends_on_the_seed_and_is_fixed_for_good():
    assert not np.array_equal(SampleOrder(1000, 0).window(np.arange(50)), SampleOrder(1000, 1).window(np.arange(50)))
    # Stopped runs must resume in the same order: these numbers may never change.
    assert SampleOrder(1000, 0).window(np.arange(8)).tolist() == [745, 386, 935, 600, 499, 931, 977, 368]


weights = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6)


def prefix_counts(stores: np.ndarray, count: int) -> np.ndarray:
    """`[samples + 1, stores]`: how many each store has given before each sample, and in all."""
    return np.concatenate([np.zeros((1, count), int), np.cumsum(stores[:, None] == np.arange(count), axis=0)])


@given(weights)
@settings(max_examples=40, deadline=None)
def test_every_share_is_kept_within_one_sample_at_every_sample(weights):
    shares, samples = Apportionment(weights), 700
    stores, numbers = shares.run(0, samples)
    counts = prefix_counts(stores, len(weights))
    ideal = np.arange(samples + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - ideal).max() < 1 + 1e-5
    assert np.array_equal(numbers, counts[np.arange(samples), stores])
    for n in range(0, samples, 37):  # found at once, it is what the walk from 0 comes to
        assert np.array_equal(shares.counts(n), counts[n])
        assert np.array_equal(shares.run(n, 20), (stores[n : n + 20], numbers[n : n + 20]))


def test_shares_hold_after_a_billion_samples():
    wanted = np.array([0.65, 0.2, 0.1, 0.049, 0.001])
    shares, first = Apportionment(wanted), 10**9
    counts = shares.counts(first) + prefix_counts(shares.run(first, 5000)[0], 5)
    assert np.abs(counts - np.arange(first, first + 5001)[:, None] * wanted).max() < 2  # weights are kept to 2^-31
    assert np.array_equal(shares.counts(first + 5000), counts[-1])


@given(weights, st.data())
@settings(max_examples=25, deadline=None)
def test_a_store_that_has_given_its_limit_leaves_its_share_to_the_others(weights, data):
    limits = [data.draw(st.integers(1, 60)) for _ in weights]
    order = BlendOrder(weights, limits)
    assert order.samples == sum(limits)
    stores, numbers = order.locate(np.arange(order.samples))
    for store, limit in enumerate(limits):
        assert np.array_equal(numbers[stores == store], np.arange(limit))
    with pytest.raises(UserError, match=rf"give {order.samples} samples .* sample {order.samples} is"):
        order.locate(np.array([order.samples]))


def test_the_others_go_on_in_proportion_to_each_other():
    order = BlendOrder([2.0, 1.0, 1.0], [100, None, None])
    assert order.samples is None
    counts = prefix_counts(order.locate(np.arange(1000))[0], 3)
    left = int(np.argmax(counts[:, 0] == 100))
    assert 199 <= left <= 200
    assert counts[left:, 0].max() == 100
    assert np.abs((counts[left:] - counts[left])[:, 1:] - np.arange(1001 - left)[:, None] / 2).max() <= 1


def test_samples_are_placed_alike_in_any_company():
    order = BlendOrder([0.6, 0.3, 0.1], [None, 5000, None])
    samples = np.arange(3 * BLOCK)
    together = order.locate(samples)
    alone = BlendOrder([0.6, 0.3, 0.1], [None, 5000, None]).locate(samples[::-7])
    assert all(np.array_equal(a[::-7], b) for a, b in zip(together, alone, strict=True))
