"""The rank that holds the others up, by its own work and not by its waiting, and what it spends its time on."""

import time

import pytest
from models import Regression, RegressionData, make_data
from torch.utils.data import DataLoader, default_collate

import raylit as pl
from raylit.driver.loop.goodput import describe_slowest_rank
from raylit.driver.ray.actor_group import ActorGroup
from raylit.protocol.messages import Measured, Paused, RankTimes, Stepped

DELAY_S = 0.1


def times(elapsed_s, *, data_wait_s=0.0, backward_s=0.0):
    return RankTimes(elapsed_s=elapsed_s, data_wait_s=data_wait_s, backward_s=backward_s)


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([times(10.0)], ""),
        ([times(10.0, backward_s=4.0), times(10.0, backward_s=4.0)], ""),
        # Ranks 0 and 2 wait in their backward passes for rank 1, whose forward passes take longer.
        (
            [times(10.0, backward_s=5.0), times(10.0, backward_s=2.0), times(10.0, backward_s=5.0)],
            "rank 1 +43% compute",
        ),
        ([times(10.0, backward_s=6.0, data_wait_s=3.0), times(10.0, backward_s=9.0)], "rank 0 +43% data wait"),
        ([times(10.0, backward_s=5.0), times(10.0, backward_s=4.0)], ""),
        ([times(0.05, backward_s=0.01), times(0.05, backward_s=0.04)], ""),
    ],
)
def test_a_rank_that_is_well_behind_is_named(ranks, text):
    assert describe_slowest_rank(ranks) == text


class SlowOnRankOne(Regression):
    def training_step(self, batch, batch_idx):
        if self.hparams.lr == 0.01 and self.trainer.global_rank == 1:
            time.sleep(DELAY_S)
        return super().training_step(batch, batch_idx)


class SlowCollate:
    def __init__(self, model):
        self.model = model

    def __call__(self, samples):
        if self.model.trainer.global_rank == 1:
            time.sleep(DELAY_S)
        return default_collate(samples)


class Seen(pl.DriverCallback):
    def __init__(self):
        self.slowest = []

    def on_step_metrics(self, run):
        self.slowest.append(run.state.slowest_rank)


@pytest.mark.parametrize("cause", ["compute", "data wait"])
def test_a_slow_rank_is_named_with_what_it_spends_its_time_on(cause, quiet):
    model = SlowOnRankOne(lr=0.01 if cause == "compute" else 0.02)
    collate = SlowCollate(model) if cause == "data wait" else default_collate
    loader = DataLoader(make_data(80), batch_size=4, collate_fn=collate)
    seen = Seen()
    pl.fit(
        model, loader, num_workers=2, max_epochs=1, log_every_n_steps=5, limit_val_batches=0, callbacks=seen, **quiet
    )
    assert len(seen.slowest) == 2
    assert [text.partition(" +")[0] for text in seen.slowest] == ["rank 1"] * 2
    assert [text.rpartition("% ")[2] for text in seen.slowest] == [cause] * 2


def test_only_rank_0_reports_the_metrics_and_times_of_all_ranks(quiet, monkeypatch):
    ranks, run = {Measured: [], Stepped: [], Paused: []}, ActorGroup.run

    def record_run(self, command):
        for rank, report in run(self, command):
            if type(report) in ranks:
                ranks[type(report)].append(rank)
            yield rank, report

    monkeypatch.setattr(ActorGroup, "run", record_run)
    pl.fit(Regression(), RegressionData(), num_workers=2, max_epochs=1, log_every_n_steps=1, **quiet)
    assert ranks[Measured] == ranks[Stepped] == [0] * 3
    assert sorted(ranks[Paused]) == [0, 1]
