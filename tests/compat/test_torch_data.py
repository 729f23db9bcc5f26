"""A loader's persistent processes are its own."""

import copy

import torch
from torch.utils.data import DataLoader

from raylit.compat.torch_data import drop_iterator


def test_a_copy_starts_processes_of_its_own():
    loader = DataLoader(torch.arange(2), num_workers=1, persistent_workers=True)
    first = iter(loader)
    assert iter(loader) is first
    clone = copy.copy(loader)
    drop_iterator(clone)
    second = iter(clone)
    assert second is not first
    assert iter(loader) is first
    assert [batch.item() for batch in second] == [0, 1]
