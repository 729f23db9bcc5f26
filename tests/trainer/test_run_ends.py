"""A run that ends inside an epoch, by whatever: its checkpoint says where the data stands, and the rest follows."""

import json
import os
import signal
from datetime import timedelta

import pytest
import torch
from models import assert_same_weights, weights_of
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import raylit as pl

NUM_BATCHES = 4
SAMPLES = torch.arange(16.0)[:, None] / 16


class Line(pl.LightningModule):
    """Writes down every batch that it trains, and its epoch's learning rate; its rate changes with each epoch."""

    def __init__(self, directory):
        super().__init__()
        self.directory = str(directory)
        self.net = nn.Linear(1, 1)
        with torch.no_grad():
            self.net.weight.fill_(0.5)
            self.net.bias.fill_(0.1)

    def training_step(self, batch, batch_idx):
        if self.trainer.is_global_zero:
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            with open(os.path.join(self.directory, "batches"), "a") as file:
                file.write(json.dumps([self.current_epoch, batch_idx, rate]) + "\n")
        loss = (self.net(batch[0]) - 1).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, step_size=1, gamma=0.5)]


class Stream(IterableDataset):
    """As many batches as `SAMPLES` has; `length`: what it says of itself, if anything."""

    def __init__(self, length=None, num_batches=NUM_BATCHES):
        self.length, self.num_batches = length, num_batches

    def __iter__(self):
        return iter([(batch,) for batch in SAMPLES.split(4)[: self.num_batches]])


class StreamWithLength(Stream):
    def __len__(self):
        return self.length


def rows(directory):
    with open(os.path.join(directory, "batches")) as file:
        return [json.loads(line) for line in file]


def loader(num_workers=0):
    return DataLoader(TensorDataset(SAMPLES), batch_size=4 // max(1, num_workers), shuffle=True)


def run(directory, *, num_workers=0, data=None, model=None, **arguments):
    torch.manual_seed(3)
    model = model or Line(directory)
    trainer = pl.Trainer(
        num_workers=num_workers,
        default_root_dir=directory,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **arguments,
    )
    trainer.fit(model, loader(num_workers) if data is None else data)
    return trainer, model


def all_at_once(tmp_path, **arguments):
    directory = tmp_path / "at once"
    directory.mkdir()
    trainer, model = run(directory, max_steps=12, **arguments)
    assert [row[:2] for row in rows(directory)] == [[epoch, batch] for epoch in range(3) for batch in range(4)]
    return rows(directory), weights_of(model), trainer.callback_metrics["loss"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_max_steps_ends_inside_an_epoch_goes_on_with_the_next_batch(num_workers, tmp_path):
    expected = all_at_once(tmp_path, num_workers=num_workers)
    first, _ = run(tmp_path, num_workers=num_workers, max_steps=6)
    assert (first.current_epoch, first.global_step) == (2, 6)
    checkpoint = torch.load(first.checkpoint_callback.newest_model_path, weights_only=True)
    position = checkpoint["raylit"]["progress"]
    assert (checkpoint["epoch"], position["batch"], position["is_epoch_ended"]) == (1, 2, False)
    assert checkpoint["lr_schedulers"][0]["last_epoch"] == 1
    second, model = run(tmp_path, num_workers=num_workers, max_steps=12, resume="auto")
    assert rows(tmp_path) == expected[0]
    assert_same_weights(weights_of(model), expected[1])
    assert second.callback_metrics["loss"] == expected[2]
    assert (second.current_epoch, second.global_step) == (3, 12)


class EndsAt(pl.Callback):
    """After a step; the sixth one is the second of the second epoch."""

    def __init__(self, how, step=6):
        self.how, self.step = how, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            if self.how == "stop":
                trainer.should_stop = True
            else:
                os.kill(os.getpid(), getattr(signal, self.how))


class TimeIsUp(pl.Timer):
    """A limit that is over at the sixth step, whatever the machine's speed."""

    def __init__(self):
        super().__init__(timedelta(hours=1))

    def next_pause_step(self, run):
        return 6

    def on_train_pause(self, run):
        if run.state.progress.global_step == 6:
            self.duration_s = 0.0
        super().on_train_pause(run)


class Falls(Line):
    """Its validations get worse from the third one on."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", -float(self.trainer.global_step) if self.trainer.global_step < 6 else 0.0)

    def val_dataloader(self):
        return DataLoader(TensorDataset(SAMPLES), batch_size=16)


ENDS = {
    "should_stop": (None, lambda: {"callbacks": EndsAt("stop")}),
    "Ctrl-C": (KeyboardInterrupt, lambda: {"callbacks": EndsAt("SIGINT")}),
    "SIGTERM": (SystemExit, lambda: {"callbacks": EndsAt("SIGTERM")}),
    "max_time": (None, lambda: {"callbacks": TimeIsUp()}),
    "early stopping": (None, lambda: {"callbacks": pl.EarlyStopping("val_loss", patience=1), "val_check_interval": 2}),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_end_inside_an_epoch_leaves_a_checkpoint_that_goes_on_with_the_next_batch(name, tmp_path):
    error, arguments = ENDS[name]
    kind = Falls if name == "early stopping" else Line
    directory = tmp_path / "at once"
    directory.mkdir()
    interval = {"val_check_interval": 2} if kind is Falls else {}
    _, model = run(directory, model=kind(directory), max_steps=12, **interval)
    expected = rows(directory), weights_of(model)
    if error is None:
        first, _ = run(tmp_path, model=kind(tmp_path), max_epochs=3, **arguments())
        assert (first.current_epoch, first.global_step) == (2, 6)
    else:
        with pytest.raises(error):
            run(tmp_path, model=kind(tmp_path), max_epochs=3, **arguments())
    assert 6 <= len(rows(tmp_path)) < 8  # a signal after the step lets one more through
    _, model = run(tmp_path, model=kind(tmp_path), max_epochs=3, resume="auto", **interval)
    assert rows(tmp_path) == expected[0]
    assert_same_weights(weights_of(model), expected[1])


class FollowsValidation(Line):
    """Its rate follows a validation metric that never gets better."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)

    def val_dataloader(self):
        return DataLoader(TensorDataset(SAMPLES), batch_size=16)


@pytest.mark.filterwarnings("ignore:.*no such metric has been logged")
@pytest.mark.parametrize(
    ("max_steps", "num_judged", "rate"),
    [(2, 0, 0.1), (4, 1, 0.1), (6, 1, 0.1), (8, 2, 0.05), (10, 2, 0.05)],
)
def test_only_complete_epochs_are_judged_by_what_follows_a_validation_metric(max_steps, num_judged, rate, tmp_path):
    """The first value is the best so far, and each further one is a check without a gain."""
    stopping, best = pl.EarlyStopping("val_loss", patience=9), pl.ModelCheckpoint(monitor="val_loss", save_top_k=-1)
    trainer, _ = run(tmp_path, model=FollowsValidation(tmp_path), max_steps=max_steps, callbacks=[stopping, best])
    assert trainer.global_step == max_steps
    assert stopping.wait_count == max(0, num_judged - 1)
    assert len(best.best_k_models) == num_judged
    rates = [row[2] for row in rows(tmp_path)]
    assert rates[-1] == (0.1 if max_steps <= 8 else 0.05)
    if num_judged:
        newest = torch.load(best.newest_model_path, weights_only=True)
        assert newest["optimizer_states"][0]["param_groups"][0]["lr"] == rate
        assert newest["lr_schedulers"][0]["num_bad_epochs"] == 0


@pytest.mark.parametrize("kind", ["data set", "stream", "stream with a length that is too large"])
def test_an_epoch_whose_last_batch_is_the_last_step_is_complete(kind, tmp_path):
    streams = {"stream": Stream(), "stream with a length that is too large": StreamWithLength(6)}
    data = loader() if kind == "data set" else DataLoader(streams[kind], batch_size=None)
    trainer, _ = run(tmp_path, data=data, max_steps=8)
    assert (trainer.current_epoch, trainer.global_step) == (2, 8)
    checkpoint = torch.load(trainer.checkpoint_callback.newest_model_path, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["raylit"]["progress"]["is_epoch_ended"]) == (1, True)
    assert checkpoint["lr_schedulers"][0]["last_epoch"] == 2
    run(tmp_path, data=data, max_steps=9, resume="auto")
    assert rows(tmp_path)[-1] == [2, 0, 0.025]


class Counting(Stream):
    """A stream with a state of its own: how many batches it has given."""

    def __init__(self):
        super().__init__()
        self.num_given = 0

    def __iter__(self):
        while self.num_given < NUM_BATCHES:
            self.num_given += 1
            yield (SAMPLES.split(4)[self.num_given - 1],)
        self.num_given = 0

    def state_dict(self):
        return {"num_given": self.num_given}

    def load_state_dict(self, state_dict):
        self.num_given = state_dict["num_given"]


def test_a_stream_with_a_state_is_not_one_batch_ahead_in_the_checkpoint(tmp_path):
    """Whether the epoch has another batch is found out by fetching it."""
    expected = tmp_path / "at once"
    expected.mkdir()
    _, model = run(expected, data=Counting(), max_steps=12)
    run(tmp_path, data=Counting(), max_steps=6)
    _, resumed = run(tmp_path, data=Counting(), max_steps=12, resume="auto")
    assert rows(tmp_path) == rows(expected)
    assert_same_weights(weights_of(resumed), weights_of(model))


@pytest.mark.parametrize("kind", ["data set", "stream", "stream with a state"])
def test_ctrl_c_after_an_epochs_last_batch_leaves_the_rest_of_its_end_to_the_next_run(kind, tmp_path):
    """A stream with a state of its own stands at its start again then."""
    make = {
        "data set": loader,
        "stream": lambda: DataLoader(Stream(), batch_size=None),
        "stream with a state": Counting,
    }
    expected = tmp_path / "at once"
    expected.mkdir()
    _, model = run(expected, data=make[kind](), max_epochs=2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=make[kind](), max_epochs=2, callbacks=EndsAt("SIGINT", step=4))
    assert len(rows(tmp_path)) == 4
    trainer, resumed = run(tmp_path, data=make[kind](), max_epochs=2, resume="auto")
    assert rows(tmp_path) == rows(expected)
    assert_same_weights(weights_of(resumed), weights_of(model))
    assert (trainer.current_epoch, trainer.global_step) == (2, 8)


class Hooks(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append((trainer.current_epoch, trainer.global_step, trainer.is_epoch_cut_short))


def test_the_hook_at_the_epochs_end_is_told_that_the_run_ends_before_it(tmp_path):
    hooks = Hooks()
    trainer, _ = run(tmp_path, max_steps=6, callbacks=hooks)
    assert hooks.seen == [(0, 4, False), (1, 6, True)]
    assert "loss" in trainer.callback_metrics


@pytest.mark.parametrize("num_done", [2, 3])
def test_a_stop_inside_a_window_of_a_stream_with_a_state_loses_no_batch(num_done, tmp_path):
    """Inside a window the stream is looked ahead in, for the end of its data."""
    expected = tmp_path / "at once"
    expected.mkdir()
    settings = {"accumulate_grad_batches": 2, "max_epochs": 2}
    _, model = run(expected, data=Counting(), **settings)
    run(tmp_path, data=Counting(), callbacks=StopsAfterBatch(num_done), **settings)
    assert len(rows(tmp_path)) == num_done
    _, resumed = run(tmp_path, data=Counting(), resume="auto", **settings)
    assert [row[:2] for row in rows(tmp_path)] == [row[:2] for row in rows(expected)]
    assert_same_weights(weights_of(resumed), weights_of(model))


class StopsAfterBatch(pl.Callback):
    def __init__(self, num_done):
        self.num_done = num_done

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or batch_idx + 1 == self.num_done


class AsksOnce(pl.Callback):
    """One rank asks for the end, in one place."""

    def __init__(self, place, step):
        self.place, self.step = place, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._ask(trainer, "start")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._ask(trainer, "end")

    def on_validation_epoch_end(self, trainer, pl_module):
        self._ask(trainer, "validation")

    def _ask(self, trainer, place):
        if (place, trainer.global_step) == (self.place, self.step) and trainer.global_rank == trainer.world_size - 1:
            trainer.should_stop = True


@pytest.mark.parametrize(
    ("num_workers", "place", "log_every", "step"),
    [
        (0, "end", 3, 4),  # at once
        (0, "start", 3, 5),
        (2, "end", 3, 6),  # at the next logging step
        (2, "end", 4, 4),
        (2, "start", 2, 6),
        (2, "end", 50, 8),  # at the epoch's end
        (2, "end", 0, 8),
        (2, "validation", 50, 4),
    ],
)
def test_a_stop_that_one_rank_asks_for_comes_at_most_one_logging_interval_later(
    num_workers, place, log_every, step, tmp_path
):
    data = DataLoader(TensorDataset(SAMPLES), batch_size=1 if num_workers else 2)  # 8 batches an epoch
    model = Falls(tmp_path) if place == "validation" else Line(tmp_path)
    trainer, _ = run(
        tmp_path,
        num_workers=num_workers,
        data=data,
        model=model,
        max_epochs=3,
        val_check_interval=4 if place == "validation" else 1.0,
        callbacks=AsksOnce(place, 4),
        log_every_n_steps=log_every,
        logger=False,
        enable_checkpointing=False,
    )
    assert (trainer.global_step, trainer.current_epoch) == (step, 1)


class Tells(pl.Callback):
    def __init__(self, directory):
        self.directory = str(directory)

    def on_keyboard_interrupt(self, trainer, pl_module):
        self._note(trainer, "keyboard")

    def on_exception(self, trainer, pl_module, exception):
        self._note(trainer, type(exception).__name__)

    def teardown(self, trainer, pl_module, stage):
        self._note(trainer, f"teardown {stage}")

    def _note(self, trainer, text):
        with open(os.path.join(self.directory, f"hooks-{trainer.global_rank}"), "a") as file:
            file.write(text + "\n")


class Raises(Line):
    """In the second batch of the second epoch, on some of the ranks."""

    def __init__(self, directory, error, ranks=(0, 1)):
        super().__init__(directory)
        self.error, self.ranks = error, ranks

    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 1) and self.global_rank in self.ranks:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_keyboard_interrupt_raised_inside_a_step_reaches_teardown(num_workers, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path,
            num_workers=num_workers,
            model=Raises(tmp_path, KeyboardInterrupt()),
            callbacks=Tells(tmp_path),
            max_epochs=3,
            logger=False,
        )
    for rank in range(max(1, num_workers)):
        lines = (tmp_path / f"hooks-{rank}").read_text().splitlines()
        assert lines == ["keyboard", "KeyboardInterrupt", "teardown fit"]


@pytest.mark.parametrize(("num_workers", "ranks"), [(0, (0,)), (2, (0, 1)), (2, (1,))])
def test_after_an_exception_the_trainer_tells_where_it_stood(num_workers, ranks, tmp_path):
    trainer = pl.Trainer(
        num_workers=num_workers,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(ValueError, match="no more"):
        trainer.fit(Raises(tmp_path, ValueError("no more"), ranks), loader(num_workers))
    assert (trainer.global_step, trainer.current_epoch) == (5, 1)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    checkpoint = torch.load(tmp_path / "mine.ckpt", weights_only=True)
    # With workers the driver's model has the weights of the start.
    assert checkpoint["global_step"] == (0 if num_workers else 5)
    assert torch.equal(checkpoint["state_dict"]["net.weight"], torch.full((1, 1), 0.5)) == bool(num_workers)
