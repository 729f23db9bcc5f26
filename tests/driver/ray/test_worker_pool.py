"""Pooled workers: a second run starts at once, in processes without leftovers."""

import gc
import locale
import logging
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from models import Regression, RegressionData

import raylit as pl
from raylit.driver.ray import local_cluster, worker_pool
from raylit.protocol.process_settings import TorchSettings


class Process(Regression):
    """Module that records the worker's process; `mess` is what a run leaves in a process."""

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


def surroundings():
    """Return a process's settings outside of torch."""
    mask = os.umask(0)
    os.umask(mask)
    return {
        "file": Path("value.txt").read_text(),
        "variables": [os.environ.get(name) for name in ("RAYLIT_TEST_A", "RAYLIT_TEST_B", "TZ")],
        "hour": time.localtime(0).tm_hour,
        "levels": [logging.getLogger(name).getEffectiveLevel() for name in ("test_warm", "test_warm.inner")],
        "is_logged": logging.getLogger("test_warm").isEnabledFor(logging.ERROR),
        "filters": [(action, category.__name__) for action, _, category, _, _ in warnings.filters[:2]],
        "umask": mask,
        "division": np.geterr()["divide"],
        "recursion": sys.getrecursionlimit(),
        "collects": gc.isenabled(),
        "locale": locale.setlocale(locale.LC_NUMERIC),
        "sharing": torch.multiprocessing.get_sharing_strategy(),
        "attention": torch.backends.cuda.flash_sdp_enabled(),
        "path": [path for path in sys.path if "of_a_test" in path],
    }


class Surroundings(Process):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen["surroundings"] = surroundings()
        return loss


@pytest.fixture
def restored_process():
    before = locale.setlocale(locale.LC_NUMERIC), torch.multiprocessing.get_sharing_strategy(), os.umask(0)
    os.umask(before[2])
    with np.errstate(), warnings.catch_warnings():
        yield
    locale.setlocale(locale.LC_NUMERIC, before[0])
    torch.multiprocessing.set_sharing_strategy(before[1])
    os.umask(before[2])
    sys.setrecursionlimit(1000)
    gc.enable()
    torch.backends.cuda.enable_flash_sdp(True)
    logging.disable(logging.NOTSET)
    logging.getLogger("test_warm").setLevel(logging.NOTSET)
    time.tzset()


def test_each_run_gets_the_drivers_current_process_settings(tmp_path, quiet, monkeypatch, restored_process):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "value.txt").write_text(name)
    monkeypatch.chdir(tmp_path / "first")
    monkeypatch.setenv("RAYLIT_TEST_A", "1")
    monkeypatch.setenv("RAYLIT_TEST_B", "1")
    first, expected_first = fit(Surroundings(), quiet), surroundings()

    monkeypatch.chdir(tmp_path / "second")
    monkeypatch.setenv("RAYLIT_TEST_A", "2")
    monkeypatch.delenv("RAYLIT_TEST_B")
    monkeypatch.setenv("TZ", "XYZ-5")
    time.tzset()
    monkeypatch.syspath_prepend(str(tmp_path / "of_a_test"))
    logging.getLogger("test_warm").setLevel(logging.DEBUG)
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore", UserWarning)
    os.umask(0o027)
    np.seterr(divide="raise")
    sys.setrecursionlimit(3000)
    gc.disable()
    locale.setlocale(locale.LC_NUMERIC, "C.UTF-8")
    torch.multiprocessing.set_sharing_strategy("file_system")
    torch.backends.cuda.enable_flash_sdp(False)
    second, expected_second = fit(Surroundings(), quiet), surroundings()

    assert second["pid"] == first["pid"]
    assert (first["surroundings"], second["surroundings"]) == (expected_first, expected_second)
    assert [expected_first[name] == expected_second[name] for name in expected_first] == [False] * len(expected_first)


def test_a_variable_read_at_process_start_needs_new_processes(quiet, monkeypatch):
    class Variable(Process):
        def on_train_end(self):
            self.seen["value"] = os.environ.get("KMP_BLOCKTIME")
            self.seen["at_start"] = "KMP_BLOCKTIME=17" in Path("/proc/self/environ").read_text().split("\0")

    worker_pool.clear()  # two groups of one worker fit next to each other
    first = fit(Variable(), quiet, num_workers=1)
    monkeypatch.setenv("KMP_BLOCKTIME", "17")
    second = fit(Variable(), quiet, num_workers=1)
    monkeypatch.delenv("KMP_BLOCKTIME")
    third = fit(Variable(), quiet, num_workers=1)
    assert (first["value"], second["value"], third["value"]) == (None, "17", None)
    assert second["at_start"]
    assert first["pid"] == third["pid"] != second["pid"]


def _change_settings():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    os.environ["RAYLIT_TEST_LEFT"] = "1"


def test_settings_of_one_run_do_not_reach_the_next(quiet):
    before = fit(Process(_change_settings), quiet)
    after = fit(Process(), quiet)
    assert after["pid"] == before["pid"]
    assert after == before


def _make_a_mistake():
    raise ValueError("on purpose")


def test_workers_that_all_failed_at_one_line_run_the_next_fit(quiet):
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
def test_a_worker_with_leftovers_of_a_run_is_replaced(mess, quiet):
    before = fit(Process(mess), quiet, num_workers=1)
    after = fit(Process(), quiet, num_workers=1)
    assert after["pid"] != before["pid"]


def test_a_worker_that_died_while_idle_is_replaced(quiet):
    first = fit(Process(), quiet)
    os.kill(first["pid"], signal.SIGKILL)
    second = fit(Process(), quiet)
    assert second["pid"] != first["pid"]


def _has_ended(pid):
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.slow
def test_an_idle_worker_that_does_not_answer_is_replaced(quiet):
    first = fit(Process(), quiet, num_workers=1, ping_timeout_s=5.0)
    os.kill(first["pid"], signal.SIGSTOP)
    second = fit(Process(), quiet, num_workers=1, ping_timeout_s=5.0)
    assert second["pid"] != first["pid"]
    assert _has_ended(first["pid"])


class Stops(Process):
    """Module in which one rank's process stops in a hook, or at the end of the run."""

    def __init__(self, place):
        super().__init__()
        self.place = place
        self.pid = 0

    def setup(self, stage):
        self.pid = os.getpid() if self.global_rank == 1 else 0
        if self.place == "setup" and self.pid:
            os.kill(self.pid, signal.SIGSTOP)

    def __del__(self):
        if self.place == "end" and os.getpid() == self.pid:
            os.kill(self.pid, signal.SIGSTOP)


def test_a_smaller_ping_timeout_applies_in_setup_too(quiet):
    with pytest.raises(pl.WorkerDied, match="has not answered for 5 s") as caught:
        fit(Stops("setup"), quiet, ping_timeout_s=5.0)
    assert caught.value.rank == 1


@pytest.mark.slow
def test_a_process_stopped_in_setup_is_distinguished_from_a_busy_one(quiet):
    with pytest.raises(pl.WorkerDied, match="has not answered for 10 s"):
        fit(Stops("setup"), quiet)


@pytest.mark.slow
def test_a_worker_that_stops_answering_at_the_end_of_a_run_is_replaced(quiet):
    model = Stops("end")
    with pytest.warns(UserWarning, match=r"the workers are replaced.* has not answered for 5 s"):
        fit(model, quiet, ping_timeout_s=5.0)
    assert model.seen["pid"] != os.getpid()  # what has trained has come back


@pytest.mark.slow
def test_idle_workers_free_their_resources_for_other_requests(quiet):
    local_cluster.connect()
    whole = ray.cluster_resources()["CPU"]
    arguments = {"num_workers": 1, "resources_per_worker": {"CPU": whole}, "start_timeout_s": 60}
    first = fit(Process(), quiet, **arguments)
    second = fit(Process(), quiet, **arguments, ping_timeout_s=11.0)
    assert _has_ended(first["pid"])
    assert ray.get(ray.remote(num_cpus=whole)(os.path.isdir).remote("/"), timeout=60)
    assert _has_ended(second["pid"])


@pytest.mark.cluster
def test_a_fit_after_reconnecting_to_ray_gets_new_workers(run_script):
    """Between the two no thread drops references to the first session's objects, at which Ray may end the process."""
    output = run_script("""
        import gc, os, ray, threading, time, torch, raylit as pl
        from raylit.driver.ray.actor_group import ActorGroup
        from torch.utils.data import DataLoader

        class Net(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(1, 1)

            def training_step(self, batch, batch_idx):
                self.pid = os.getpid()
                return self.layer(batch).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        def pid():
            net = Net()
            pl.fit(net, DataLoader(torch.ones(4, 1)), num_workers=1, max_epochs=1, logger=False,
                   enable_checkpointing=False, enable_progress_bar=False)
            return net.pid

        if __name__ == "__main__":
            pids = [pid()]  # on raylit's own node
            for _ in range(2):
                ray.shutdown()
                deadline = time.monotonic() + 30
                while any(thread.name == "raylit-idle-workers" for thread in threading.enumerate()):
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                assert any(isinstance(it, ActorGroup) for it in gc.get_objects())
                ray.init("local", include_dashboard=False, log_to_driver=False)
                pids += [pid(), pid()]
            print(len(set(pids)), pids[1] == pids[2], pids[3] == pids[4])
    """)
    assert "3 True True" in output


@pytest.mark.slow
def test_the_next_run_uses_a_changed_user_file(tmp_path, run_script):
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


def test_every_run_has_new_processes_without_the_pool(quiet):
    first = fit(Process(), quiet, num_workers=1, keep_workers_s=0)
    second = fit(Process(), quiet, num_workers=1, keep_workers_s=0)
    assert first["pid"] != second["pid"]
