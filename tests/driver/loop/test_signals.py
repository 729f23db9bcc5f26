"""Ctrl-C and SIGTERM during a run, and workers that no longer answer.

The signals are real ones, sent to this process or to the process group of a script.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from models import Regression, RegressionData, assert_same_weights

import raylit as pl
from raylit.checkpoint import format
from raylit.driver.loop.signals import SignalHandler

LIMIT_S = 60
"""From the signal to the end of the run, on a busy machine."""


class Watched(Regression):
    """Module that is slow at one place and writes a file there, so that the test knows where the workers are."""

    def __init__(self, directory, *, place, delay_s=0.05):
        super().__init__()
        self.directory, self.place, self.delay_s = str(directory), place, delay_s

    def _pass(self, place):
        if place == self.place:
            Path(self.directory, f"at-{place}-{self.trainer.global_rank}").touch()
            time.sleep(self.delay_s)

    def setup(self, stage):
        self._pass("setup")

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step >= 3:
            self._pass("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self._pass("validation")
        super().validation_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        self._pass("save")


class Witness(pl.Callback):
    """Callback that records on every rank which hooks are called."""

    def __init__(self, directory):
        self.directory = str(directory)

    def on_keyboard_interrupt(self, trainer, pl_module):
        self._note(trainer, "keyboard")

    def on_exception(self, trainer, pl_module, exception):
        self._note(trainer, type(exception).__name__)

    def on_train_end(self, trainer, pl_module):
        self._note(trainer, "end")

    def _note(self, trainer, text):
        with open(os.path.join(self.directory, f"hooks-{trainer.global_rank}"), "a") as file:
            file.write(f"{text} {trainer.global_step}\n")


class DriverWitness(pl.DriverCallback):
    def __init__(self):
        self.errors = []

    def on_exception(self, run, error):
        self.errors.append(type(error))


def send_when(directory, place, num_workers, *signals, gap_s=1.0):
    """Send the signals, one after the other, once every worker is at the place. Returns the list of times sent."""
    sent = []

    def wait_and_send():
        expected = {f"at-{place}-{rank}" for rank in range(max(1, num_workers))}
        deadline = time.monotonic() + 90
        while not expected <= set(os.listdir(directory)) and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in signals:
            sent.append(time.monotonic())
            os.kill(os.getpid(), number)
            time.sleep(gap_s)

    threading.Thread(target=wait_and_send, daemon=True).start()
    return sent


def run_until(error, directory, *, place, signals, num_workers, delay_s=0.05, data=None, **arguments):
    """Run a fit that ends with this error; return the Trainer, the model and the exception."""
    driver = DriverWitness()
    trainer = pl.Trainer(
        num_workers=num_workers,
        max_epochs=500,
        logger=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        default_root_dir=directory,
        callbacks=[Witness(directory), driver, *arguments.pop("callbacks", [])],
        **arguments,
    )
    model = Watched(directory, place=place, delay_s=delay_s)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    sent = send_when(directory, place, num_workers, *signals)
    with pytest.raises(error) as caught:
        trainer.fit(model, data or RegressionData(num_train=480))
    assert sent
    assert time.monotonic() - sent[-1] < LIMIT_S
    after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    if num_workers == 0:
        assert after == before
    assert trainer.interrupted
    assert driver.errors == ([] if place == "setup" else [error])
    return trainer, model, caught.value


def hooks_of(directory, rank):
    path = Path(directory, f"hooks-{rank}")
    return path.read_text().split() if path.exists() else []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ctrl_c_ends_all_ranks_at_one_step_saves_and_returns_the_weights(num_workers, tmp_path):
    trainer, model, _ = run_until(
        KeyboardInterrupt, tmp_path, place="training", signals=[signal.SIGINT], num_workers=num_workers
    )
    path = trainer.checkpoint_callback.newest_model_path
    checkpoint = torch.load(path, weights_only=True)
    step = checkpoint["global_step"]
    assert step == trainer.global_step >= 3
    assert step % 50, "an interval's end would prove nothing"
    assert_same_weights(checkpoint["state_dict"], model.state_dict())
    for rank in range(max(1, num_workers)):
        assert hooks_of(tmp_path, rank) == ["keyboard", str(step), "KeyboardInterrupt", str(step)]
    again = pl.Trainer(num_workers=0, max_steps=step + 2, logger=False, enable_progress_bar=False)
    again.fit(Regression(), RegressionData(num_train=480), ckpt_path=path)
    assert again.global_step == step + 2
    assert not again.interrupted


@pytest.mark.parametrize("num_workers", [0, 2])
def test_sigterm_ends_a_validation(num_workers, tmp_path):
    _, _, error = run_until(
        SystemExit,
        tmp_path,
        place="validation",
        signals=[signal.SIGTERM],
        num_workers=num_workers,
        data=RegressionData(num_train=48, num_val=8000),
    )
    assert error.code == 143
    (path,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == (6 if num_workers == 0 else 3)
    assert format.read_progress(checkpoint).validated_batch == 0
    assert hooks_of(tmp_path, 0)[::2] == ["SystemExit"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_second_ctrl_c_ends_the_run_at_once(num_workers, tmp_path):
    run_until(
        KeyboardInterrupt,
        tmp_path,
        place="training",
        signals=[signal.SIGINT, signal.SIGINT],
        num_workers=num_workers,
        delay_s=600,
    )
    assert not list(tmp_path.rglob("*.ckpt"))


def test_ctrl_c_during_setup_ends_the_run_at_once(tmp_path):
    run_until(KeyboardInterrupt, tmp_path, place="setup", signals=[signal.SIGINT], num_workers=1, delay_s=600)


def test_ctrl_c_during_a_save_lets_it_finish(tmp_path):
    trainer, _, _ = run_until(
        KeyboardInterrupt,
        tmp_path,
        place="save",
        signals=[signal.SIGINT],
        num_workers=0,
        delay_s=1.0,
        callbacks=[pl.ModelCheckpoint(every_n_train_steps=7)],
    )
    assert trainer.global_step == 7
    (path,) = tmp_path.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 7


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_during_the_start_of_ray_is_handled_after_it(number, error):
    interrupts = SignalHandler(on_first=lambda: None)
    interrupts.is_connecting = True
    interrupts.install()
    try:
        os.kill(os.getpid(), number)
        assert interrupts.pending == number.name
        with pytest.raises(error):
            interrupts.check()
    finally:
        interrupts.restore()


def test_a_sigterm_handled_by_ray_ends_with_exit_code_143():
    interrupts = SignalHandler(on_first=lambda: None)
    interrupts.is_connecting = True
    error = SystemExit(signal.SIGTERM)
    assert interrupts.status_after(error) == "interrupted"
    assert (error.code, interrupts.pending) == (143, "SIGTERM")
    of_the_user_s = SystemExit(4)
    assert SignalHandler(on_first=lambda: None).status_after(of_the_user_s) == "failed"
    assert of_the_user_s.code == 4


class StopsAChild(Regression):
    """Module that forks processes in a step, as a user's pool would, and ends each by a signal before it starts."""

    def training_step(self, batch, batch_idx):
        self.exit_codes = []
        for _ in range(5):
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            child.terminate()
            child.join(20)
            self.exit_codes.append(child.exitcode)
            child.kill()
        return super().training_step(batch, batch_idx)


def test_a_process_forked_by_a_hook_handles_sigterm_itself(quiet):
    model = StopsAChild()
    trainer = pl.Trainer(num_workers=0, max_steps=1, **quiet)
    trainer.fit(model, RegressionData())
    assert model.exit_codes == [-signal.SIGTERM] * 5
    assert not trainer.interrupted


IN_A_GROUP = """
import pathlib, sys, time
import torch
import raylit as pl
from models import Regression, RegressionData

num_workers, num_processes = int(sys.argv[1]), int(sys.argv[2])

class Slow(Regression):
    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3 and self.global_rank == 0:
            pathlib.Path("ready").touch()
        time.sleep(0.05)
        return super().training_step(batch, batch_idx)

class Data(RegressionData):
    def train_dataloader(self):
        loader = super().train_dataloader()
        return torch.utils.data.DataLoader(loader.dataset, batch_size=8, num_workers=num_processes)

if __name__ == "__main__":
    trainer = pl.Trainer(
        num_workers=num_workers, max_epochs=500, logger=False, enable_progress_bar=False, num_sanity_val_steps=0
    )
    trainer.fit(Slow(), Data(num_train=960))
"""


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("number", "num_workers", "num_processes"),
    [(signal.SIGTERM, 2, 1), (signal.SIGHUP, 2, 0), (signal.SIGTERM, 0, 2), (signal.SIGINT, 0, 2)],
)
def test_a_signal_to_the_process_group_ends_the_run_orderly(number, num_workers, num_processes, tmp_path):
    (tmp_path / "script.py").write_text(IN_A_GROUP)
    with open(tmp_path / "printed", "w") as printed:
        script = subprocess.Popen(
            [sys.executable, "script.py", str(num_workers), str(num_processes)],
            cwd=tmp_path,
            stdout=printed,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "ready").exists() and script.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(script.pid, number)
        code = script.wait(timeout=LIMIT_S)
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
            script.wait()
    text = (tmp_path / "printed").read_text()
    # Python ends by SIGINT itself.
    assert code == (-number if number == signal.SIGINT else 128 + number), text
    assert text.count("the run ends after this step and is saved") == 1, text
    assert "rpc_client" not in text
    assert "DataLoader worker" not in text
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] >= 3


class Freezes(Regression):
    def __init__(self, directory):
        super().__init__()
        self.path = os.path.join(directory, "pid")

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == 1:
            Path(self.path).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
def test_a_stopped_worker_is_detected_by_its_heartbeat_and_killed(quiet, tmp_path):
    trainer = pl.Trainer(num_workers=2, max_epochs=1, ping_timeout_s=3.0, **quiet)
    with pytest.raises(pl.WorkerDied, match="has not answered for 3 s") as caught:
        trainer.fit(Freezes(str(tmp_path)), RegressionData(batch_size=4))
    found_out_after_s = time.time() - (tmp_path / "pid").stat().st_mtime
    assert caught.value.rank == 1
    assert found_out_after_s < LIMIT_S
    deadline = time.monotonic() + 10
    while Path("/proc", (tmp_path / "pid").read_text(), "cmdline").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path("/proc", (tmp_path / "pid").read_text(), "cmdline").exists()
