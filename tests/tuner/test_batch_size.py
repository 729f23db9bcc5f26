"""The search for the largest batch size."""

import pytest
import torch

from raylit.errors import WorkerDied
from raylit.tuner.batch_size import SizeSearch, is_out_of_memory


def search(limit, *, num_samples=10_000, num_trials=25, first=2, is_exact=False):
    tried = []

    def try_size(size):
        tried.append(size)
        if size > limit:
            raise MemoryError
        return -(-num_samples // size)

    found = SizeSearch(try_size, is_too_large=is_out_of_memory, num_trials=num_trials).run(first, is_exact=is_exact)
    return found, tried


def test_sizes_are_doubled_until_one_is_too_large():
    assert search(20) == (16, [2, 4, 8, 16, 32])


@pytest.mark.parametrize("limit", range(2, 40))
def test_the_exact_search_finds_the_largest(limit):
    assert search(limit, is_exact=True)[0] == limit


def test_data_and_trials_end_the_search():
    assert search(100, num_samples=8) == (8, [2, 4, 8])
    assert search(100, num_trials=3, is_exact=True) == (8, [2, 4, 8])


def test_the_first_size_has_to_fit_and_other_errors_pass_through():
    with pytest.raises(MemoryError):
        search(1)

    def breaks(size):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        SizeSearch(breaks, is_too_large=is_out_of_memory, num_trials=3).run(2, is_exact=False)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (WorkerDied(rank=1, host="a", reason="killed by Ray, as the host was low on memory"), True),
        (WorkerDied(rank=1, host="a", reason="segmentation fault"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_an_error_of_memory_is_known_by_type_or_words(error, is_memory):
    assert is_out_of_memory(error) == is_memory
