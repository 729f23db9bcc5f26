"""DeviceStatsMonitor and ThroughputMonitor."""

import time

import pytest
from models import Regression, RegressionData, fit

import raylit as pl


class Timed(Regression):
    flops_per_batch = 1000

    def training_step(self, batch, batch_idx):
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)


def test_throughput_counts_and_measures_over_its_window():
    monitor = pl.ThroughputMonitor(
        lambda batch: len(batch[0]), lambda batch: batch[0].numel(), window_size=4, available_flops=1e6
    )
    trainer = fit(Timed(), callbacks=monitor, logger=pl.CSVLogger("."), log_every_n_steps=2)
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert (logged["train/batches"], logged["train/samples"], logged["train/lengths"]) == (12, 96, 768)
    rate = logged["train/device/batches_per_sec"]
    assert 0 < rate < 100
    assert logged["train/device/samples_per_sec"] == pytest.approx(8 * rate)
    assert logged["train/device/items_per_sec"] == pytest.approx(64 * rate)
    assert logged["train/device/flops_per_sec"] == pytest.approx(1000 * rate)
    assert logged["train/device/mfu"] == pytest.approx(1000 * rate / 1e6)
    assert logged["train/time"] > 0.12
    assert "train/batches_per_sec" not in logged


def test_throughput_over_all_workers_and_with_another_separator():
    monitor = pl.ThroughputMonitor(lambda batch: len(batch[0]), window_size=4, separator=".")
    logger = pl.CSVLogger(".")
    trainer = fit(Timed(), callbacks=monitor, logger=logger, log_every_n_steps=1, num_workers=2)
    logged = {name: value.item() for name, value in trainer.logged_metrics.items()}
    assert logged["train.samples"] == 48
    assert logged["train.samples_per_sec"] == pytest.approx(2 * logged["train.device.samples_per_sec"])


def test_before_the_window_is_full_there_are_no_rates():
    monitor = pl.ThroughputMonitor(lambda batch: len(batch[0]))
    trainer = fit(Timed(), callbacks=monitor, logger=pl.CSVLogger("."), log_every_n_steps=1)
    assert [name for name in trainer.logged_metrics if name.startswith("train/")] == [
        "train/batches",
        "train/samples",
        "train/time",
    ]


def test_validation_does_not_count_as_training_time(tmp_path):
    class Slow(Regression):
        def validation_step(self, batch, batch_idx):
            time.sleep(0.3)

    monitor = pl.ThroughputMonitor(lambda batch: len(batch[0]))
    trainer = pl.Trainer(
        max_epochs=3, callbacks=monitor, log_every_n_steps=1, enable_progress_bar=False, num_sanity_val_steps=0
    )
    started = time.perf_counter()
    trainer.fit(Slow(), RegressionData(num_val=8))
    # Two validations of 0.3 s lie between the first and the last logging step.
    assert trainer.logged_metrics["train/time"].item() <= time.perf_counter() - started - 2 * 0.3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_device_statistics_come_at_both_ends_of_a_logging_steps_batch(num_workers):
    logger = pl.CSVLogger(".")
    callback = pl.DeviceStatsMonitor()
    trainer = fit(Regression(), callbacks=callback, logger=logger, log_every_n_steps=3, num_workers=num_workers)
    names = {name for name in trainer.logged_metrics if name.startswith("DeviceStatsMonitor.")}
    kinds = ("cpu_percent", "cpu_vm_percent", "cpu_swap_percent")
    assert names == {f"DeviceStatsMonitor.on_train_batch_{end}/{kind}" for end in ("start", "end") for kind in kinds}
    assert 0 < trainer.logged_metrics["DeviceStatsMonitor.on_train_batch_end/cpu_vm_percent"].item() <= 100


def test_the_cpus_statistics_may_be_left_out():
    trainer = fit(
        Regression(), callbacks=pl.DeviceStatsMonitor(cpu_stats=False), logger=pl.CSVLogger("."), log_every_n_steps=1
    )
    assert [name for name in trainer.logged_metrics if name.startswith("DeviceStatsMonitor")] == []


@pytest.mark.parametrize("make", [pl.DeviceStatsMonitor, lambda: pl.ThroughputMonitor(len)])
def test_monitors_without_a_logger_are_an_error(make):
    with pytest.raises(pl.ConfigError, match="Monitor has no logger"):
        pl.Trainer(callbacks=make(), logger=False)


def test_a_window_of_one_batch_is_refused():
    with pytest.raises(pl.ConfigError, match="window_size=1"):
        pl.ThroughputMonitor(len, window_size=1)
