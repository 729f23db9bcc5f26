"""The sizes that a batch size search tries, and the one that it chooses, from given outcomes."""

import pytest

from raylit.tune.search.batch_size import BatchSizeChoices, BatchSizes, SizeSearch, Timing, search_steps
from raylit.tune.search.trial import Outcome


def search(
    limit,
    *,
    mode="power",
    first=2,
    num_samples=10_000,
    num_trials=25,
    sizes=range(1, 8193),
    margin=0.0,
    batch_s=lambda size: 1.0,
):
    """The chosen size and those that were tried."""
    choices = BatchSizeChoices(sizes=sizes, world_size=1, window=1)
    searched = SizeSearch(search_steps(mode, sizes, first=first), num_trials=num_trials, choices=choices)
    tried = []
    while (size := searched.propose()) is not None:
        tried.append(size)
        if size > limit:
            outcome = Outcome(error=MemoryError(f"of {size}"), failure="too large")
        else:
            timing = Timing(num_samples=size, batch_s=batch_s(size), step_batch_s=batch_s(size))
            outcome = Outcome(findings=timing, num_batches=-(-num_samples // size))
        searched.receive(size, outcome)
    return BatchSizes(searched.trials, mode=mode, choices=choices, margin=margin).suggestion(), tried


def test_sizes_are_doubled_until_one_is_too_large():
    assert search(20) == (16, [2, 4, 8, 16, 32])


def test_a_first_size_that_does_not_fit_is_halved():
    assert search(5, first=64) == (4, [64, 32, 16, 8, 4])
    assert search(5, first=64, mode="binsearch")[0] == 5
    assert search(0, first=4) == (None, [4, 2, 1])


@pytest.mark.parametrize("limit", [*range(1, 40), 8191, 8192, 9000])
def test_binsearch_finds_the_largest_size_that_fits(limit):
    assert search(limit, mode="binsearch", num_samples=10**6)[0] == min(limit, 8192)


def test_a_margin_is_left_where_memory_was_the_limit():
    assert search(100, mode="binsearch", margin=0.05)[0] == 95
    assert search(10_000, mode="binsearch", margin=0.05, num_samples=10**6)[0] == 8192


def test_the_search_ends_at_one_batch_of_data_max_trials_or_the_largest_size():
    assert search(100, num_samples=8) == (8, [2, 4, 8])
    assert search(100, mode="binsearch", num_samples=8) == (8, [2, 4, 8])
    assert search(100, num_trials=3, mode="binsearch") == (8, [2, 4, 8])
    assert search(100, sizes=range(1, 25)) == (24, [2, 4, 8, 16, 24])


def test_only_sizes_that_divide_the_samples_of_a_step_are_tried():
    divisors = [1, 2, 3, 4, 6, 8, 12, 24]
    assert search(10, sizes=divisors) == (8, [2, 4, 8, 24, 12])
    assert search(13, sizes=divisors, mode="binsearch")[0] == 12


def test_throughput_chooses_a_smaller_size_if_large_ones_are_slow():
    """Time grows by the square beyond 64 samples."""

    def batch_s(size):
        return 1.0 + size / 64 + (max(0, size - 64) / 32) ** 2

    size, tried = search(10**6, mode="throughput", batch_s=batch_s)
    speeds = {size: size / batch_s(size) for size in range(1, 8193)}
    assert speeds[size] > 0.95 * max(speeds.values())
    assert max(tried) <= 512  # twice slower: no use in larger ones


def test_throughput_chooses_the_largest_size_if_it_is_the_fastest():
    assert search(100, mode="throughput") == (96, [2, 4, 8, 16, 32, 64, 128, 48, 96])


def test_accumulated_batches_are_timed_with_their_share_of_a_step():
    timing = Timing(num_samples=8, batch_s=1.0, step_batch_s=3.0)
    assert timing.samples_per_s(1) == pytest.approx(8 / 3)
    assert timing.samples_per_s(4) == pytest.approx(32 / 6)
