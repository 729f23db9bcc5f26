"""The ledger of a run's wall time: slow data, steps, validations and saves each land in their own cause."""

import csv
import os
import time

import pytest
from models import Regression, make_data
from torch.utils.data import DataLoader, IterableDataset, default_collate

import raylit as pl
from raylit.driver.loop.goodput import Goodput, GoodputLedger

DATA_S, STEP_S, VALIDATION_S, SAVE_S, SETUP_S, COMPILATION_S = 0.06, 0.04, 0.1, 0.3, 0.25, 0.5
NUM_EPOCHS, NUM_BATCHES, NUM_VAL_BATCHES = 2, 5, 3


def collate_slowly(samples):
    """Make a batch, which takes time on rank 1 and in a run without ranks."""
    if os.environ.get("RANK", "1") == "1":
        time.sleep(DATA_S)
    return default_collate(samples)


class SlowEverywhere(Regression):
    def setup(self, stage):
        time.sleep(SETUP_S)

    def training_step(self, batch, batch_idx):
        time.sleep(STEP_S)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        time.sleep(VALIDATION_S)

    def on_save_checkpoint(self, checkpoint):
        time.sleep(SAVE_S)


def load(num_batches, num_workers=0, **options):
    return DataLoader(make_data(4 * num_batches * max(1, num_workers)), batch_size=4, **options)


def fit(model, train, *, quiet, **arguments):
    """Return the goodput of a fit and its wall time."""
    trainer = pl.Trainer(num_sanity_val_steps=0, **{**quiet, **arguments})
    began_at = time.perf_counter()
    trainer.fit(model, train, load(NUM_VAL_BATCHES, arguments["num_workers"]))
    return trainer.goodput, time.perf_counter() - began_at


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_slow_lands_in_its_cause_and_the_causes_add_up_to_the_wall_time(num_workers, tmp_path, quiet):
    goodput, wall_s = fit(
        SlowEverywhere(),
        load(NUM_BATCHES, num_workers, collate_fn=collate_slowly),
        quiet={**quiet, "enable_checkpointing": True},
        num_workers=num_workers,
        max_epochs=NUM_EPOCHS,
        default_root_dir=tmp_path,
    )
    assert goodput.total == pytest.approx(wall_s, rel=0.02, abs=0.05)
    assert sum(goodput.to_dict().values()) == pytest.approx(goodput.total)
    slept_s = {
        "start": SETUP_S,
        "data_wait": NUM_EPOCHS * NUM_BATCHES * DATA_S,
        "steps": NUM_EPOCHS * NUM_BATCHES * STEP_S,
        "validation": NUM_EPOCHS * NUM_VAL_BATCHES * VALIDATION_S,
        "saving": NUM_EPOCHS * SAVE_S,
    }
    assert [cause for cause, seconds in slept_s.items() if getattr(goodput, cause) < seconds] == [], goodput
    assert goodput.fraction == goodput.steps / goodput.total
    assert (goodput.recovery, goodput.compilation) == (0.0, 0.0)


class Stream(IterableDataset):
    def __iter__(self):
        for number in range(4 * NUM_BATCHES):
            yield make_data()[number]


def test_looking_ahead_in_a_stream_is_data_wait(quiet):
    stream = DataLoader(Stream(), batch_size=4, collate_fn=collate_slowly)
    goodput, _ = fit(Regression(), stream, quiet=quiet, num_workers=0, max_epochs=1, accumulate_grad_batches=3)
    assert goodput.data_wait >= NUM_BATCHES * DATA_S


def compile_slowly(graph, example_inputs):
    time.sleep(COMPILATION_S)
    return graph.forward


@pytest.mark.slow
def test_compilation_has_a_cause_of_its_own(quiet):
    arguments = {"num_workers": 0, "max_steps": 2, "compile": {"backend": compile_slowly}}
    goodput, wall_s = fit(Regression(), load(NUM_BATCHES), quiet=quiet, **arguments)
    assert goodput.compilation >= COMPILATION_S
    assert goodput.total == pytest.approx(wall_s, rel=0.02, abs=0.05)


def test_the_steps_of_an_evaluation_are_its_batches(quiet):
    trainer = pl.Trainer(num_workers=0, **quiet)
    assert trainer.goodput is None
    trainer.validate(SlowEverywhere(), load(NUM_VAL_BATCHES), verbose=False)
    assert trainer.goodput.steps >= NUM_VAL_BATCHES * VALIDATION_S
    assert trainer.goodput.validation == 0.0
    trainer.predict(Regression(), load(NUM_BATCHES))
    assert 0.0 < trainer.goodput.steps < trainer.goodput.total


def test_a_run_that_fails_has_a_goodput_too(quiet):
    class Fails(SlowEverywhere):
        def on_train_epoch_end(self):
            raise ValueError("at the end")

    trainer = pl.Trainer(num_workers=0, max_epochs=1, limit_val_batches=0, **quiet)
    with pytest.raises(ValueError, match="at the end"):
        trainer.fit(Fails(), load(NUM_BATCHES))
    assert trainer.goodput.steps >= NUM_BATCHES * STEP_S


def test_it_is_logged_once_at_the_end_of_a_fit(tmp_path, quiet):
    logger = pl.CSVLogger(tmp_path)
    goodput, _ = fit(
        Regression(), load(NUM_BATCHES), quiet={**quiet, "logger": logger}, num_workers=0, max_epochs=NUM_EPOCHS
    )
    with open(os.path.join(logger.log_dir, "metrics.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["goodput/total_s"]]
    assert len(rows) == 1
    assert int(rows[0]["step"]) == NUM_EPOCHS * NUM_BATCHES - 1
    assert {name for name in rows[0] if name.startswith("goodput/")} == set(goodput.to_metrics())
    assert float(rows[0]["goodput/steps_s"]) == pytest.approx(goodput.steps)


@pytest.mark.parametrize("switch", ["enable_progress_bar", "enable_model_summary", None])
def test_one_line_ends_a_fit_unless_nothing_is_shown(switch, capsys, quiet):
    shown = {} if switch is None else {switch: True}
    goodput, _ = fit(Regression(), load(NUM_BATCHES), quiet={**quiet, **shown}, num_workers=0, max_epochs=1)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "goodput" in line] == ([] if switch is None else [str(goodput)])


def test_the_line_names_the_causes_that_took_time():
    goodput = Goodput(steps=90.0, start=6.0, data_wait=0.01, saving=4.0)
    assert str(goodput) == "goodput 90.0% of 100.0 s: steps 90.0 s, start 6.0 s, saving 4.0 s"
    assert str(Goodput()) == "goodput 0.0% of 0.0 s: nothing took time"


def test_no_more_is_moved_to_another_cause_than_there_is():
    ledger = GoodputLedger(started_at=time.perf_counter() - 1.0)
    ledger.charge("steps")
    ledger.move(100.0, source="start", target="data_wait")
    ledger.close()
    goodput = ledger.read()
    assert goodput.start == 0.0
    assert goodput.data_wait >= 1.0
    assert ledger.read() == goodput
