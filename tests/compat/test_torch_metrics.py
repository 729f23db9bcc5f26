"""The states of real torchmetrics objects."""

import sys

import pytest
import torch
import torchmetrics

from raylit.compat import torch_metrics


@pytest.fixture
def mean():
    metric = torchmetrics.MeanMetric()
    metric.update(2.0)
    return metric


def test_objects_are_known(mean, monkeypatch):
    assert torch_metrics.is_metric(mean)
    assert not torch_metrics.is_metric(torch.nn.Identity())
    monkeypatch.delitem(sys.modules, "torchmetrics")
    assert not torch_metrics.is_metric(mean)


def test_the_value_of_the_last_batch_is_there_after_forward(mean):
    assert torch_metrics.read_forward_value(mean) is None
    mean(4.0)
    assert torch_metrics.read_forward_value(mean).item() == 4.0
    mean.reset()
    assert torch_metrics.read_forward_value(mean) is None


def test_updates_are_counted_and_can_be_set(mean):
    assert torch_metrics.read_num_updates(mean) == 1
    mean.compute()
    mean.mean_value.fill_(10.0)
    torch_metrics.set_num_updates(mean, 3)
    assert torch_metrics.read_num_updates(mean) == mean.update_count == 3
    assert mean.compute().item() == 10.0


def test_a_forgotten_value_is_computed_anew(mean):
    assert mean.compute().item() == 2.0
    mean.mean_value.fill_(10.0)
    assert mean.compute().item() == 2.0
    torch_metrics.forget_value(mean)
    assert mean.compute().item() == 10.0


def test_every_state_has_its_reduction(mean):
    assert torch_metrics.list_reductions(mean).keys() == mean.metric_state.keys()
    (total,) = torch_metrics.list_reductions(torchmetrics.SumMetric()).values()
    assert total(torch.tensor([1.0, 2.0])).item() == 3.0


class Averaging(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.add_state("value", torch.tensor(1.0), dist_reduce_fx="mean")

    def update(self): ...

    def compute(self):
        return self.value


def test_concatenation_and_mean_are_told_from_other_reductions():
    reductions = [
        torch_metrics.list_reductions(metric).popitem()[1]
        for metric in (torchmetrics.CatMetric(), Averaging(), torchmetrics.SumMetric())
    ]
    assert [torch_metrics.is_concatenating(one) for one in reductions] == [True, False, False]
    assert [torch_metrics.is_averaging(one) for one in reductions] == [False, True, False]


def test_the_default_of_a_state_is_what_a_reset_leaves():
    metric = Averaging()
    metric.value = torch.tensor(7.0)
    assert torch_metrics.read_default(metric, "value").item() == 1.0
    assert torch_metrics.read_default(torchmetrics.CatMetric(), "value") == []


def test_a_state_is_reset_without_a_change_of_the_one_before():
    metric = Averaging()
    metric.value = before = torch.tensor(7.0)
    assert torch_metrics.is_state_changed(metric, "value")
    torch_metrics.reset_state(metric, "value")
    assert (metric.value.item(), before.item()) == (1.0, 7.0)
    assert not torch_metrics.is_state_changed(metric, "value")


def test_a_list_state_has_changed_once_something_is_in_it():
    metric = torchmetrics.CatMetric()
    assert not torch_metrics.is_state_changed(metric, "value")
    metric.update(1.0)
    assert torch_metrics.is_state_changed(metric, "value")
    torch_metrics.reset_state(metric, "value")
    assert metric.value == []


def test_sync_is_off_until_it_is_restored(mean):
    synced = []
    mean.distributed_available_fn = lambda: True
    mean.dist_sync_fn = lambda value, group=None: synced.append(1) or [value, value]
    was_syncing = torch_metrics.disable_sync(mean)
    mean.compute()
    assert (was_syncing, synced) == (True, [])
    torch_metrics.restore_sync(mean, is_syncing=was_syncing)
    torch_metrics.forget_value(mean)
    mean.compute()
    assert synced
