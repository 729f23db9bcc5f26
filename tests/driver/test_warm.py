"""Warm workers: a second run starts at once, in processes as good as new."""

import os
import signal
import sys
import threading
import time

import pytest
import torch
from models import Regression, RegressionData

import raylit as pl
from raylit.torch_settings import TorchSettings


class Process(Regression):
    """Notes the worker's process; `mess` is what a run may leave in a process."""

    def __init__(self, mess=None):
        super().__init__()
        self.mess = mess
        self.seen = {}

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.seen = {
                "pid": os.getpid(),
                "variable": os.environ.get("RAYLIT_TEST_LEFT"),
                "threads": torch.get_num_threads(),
                "settings": TorchSettings.current(),
            }
            if self.mess is not None:
                self.mess()
        return super().training_step(batch, batch_idx)


def fit(model, quiet, **arguments):
    pl.fit(model, RegressionData(), **{"num_workers": 2, "max_epochs": 1, **quiet, **arguments})
    return model.seen


def test_a_second_fit_runs_in_the_same_processes(quiet):
    first, second = fit(Process(), quiet), fit(Process(), quiet)
    assert second["pid"] == first["pid"]


def _change_settings():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    os.environ["RAYLIT_TEST_LEFT"] = "1"


def test_settings_of_one_run_are_gone_in_the_next(quiet):
    before = fit(Process(_change_settings), quiet)
    after = fit(Process(), quiet)
    assert after["pid"] == before["pid"]
    assert after == before


def _make_a_mistake():
    raise ValueError("on purpose")


def test_workers_that_have_all_failed_at_one_line_go_on_with_the_next_run(quiet):
    before = fit(Process(), quiet)
    with pytest.raises(ValueError, match="on purpose"):
        fit(Process(_make_a_mistake), quiet)
    after = fit(Process(), quiet)
    assert after["pid"] == before["pid"]


def _leave_a_thread():
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def _leave_a_reference():
    frame = sys._getframe(1)
    sys.modules["left_by_a_test"] = frame.f_locals["self"]


@pytest.mark.parametrize("mess", [_leave_a_thread, _leave_a_reference])
def test_a_worker_in_which_something_is_left_is_replaced(mess, quiet):
    before = fit(Process(mess), quiet, num_workers=1)
    after = fit(Process(), quiet, num_workers=1)
    assert after["pid"] != before["pid"]


def test_a_worker_that_has_died_while_it_was_idle_is_replaced(quiet):
    first = fit(Process(), quiet)
    os.kill(first["pid"], signal.SIGKILL)
    second = fit(Process(), quiet)
    assert second["pid"] != first["pid"]


def test_a_changed_file_of_the_users_is_seen_by_the_next_run(tmp_path, run_script):
    (tmp_path / "mine.py").write_text("VALUE = 1\n")
    output = run_script("""
        import os, time, torch, raylit as pl
        from torch.utils.data import DataLoader
        class Net(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(1, 1)
            def training_step(self, batch, batch_idx):
                import mine
                self.value = mine.VALUE
                self.pid = os.getpid()
                return self.layer(batch).mean()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)
        if __name__ == "__main__":
            models = [Net(), Net(), Net()]
            for index, model in enumerate(models):
                if index == 2:
                    with open("mine.py", "w") as file:
                        file.write("VALUE = 2  # changed")
                pl.fit(model, DataLoader(torch.ones(4, 1)), num_workers=1, max_epochs=1, logger=False,
                       enable_checkpointing=False, enable_progress_bar=False)
            print([model.value for model in models], models[0].pid == models[1].pid, models[1].pid == models[2].pid)
    """)
    assert "[1, 1, 2] True False" in output


def test_without_keeping_every_run_has_new_processes(quiet):
    first = fit(Process(), quiet, num_workers=1, keep_workers_s=0)
    second = fit(Process(), quiet, num_workers=1, keep_workers_s=0)
    assert first["pid"] != second["pid"]
