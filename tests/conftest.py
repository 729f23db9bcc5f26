"""One Ray node for the whole test session: raylit's own embedded one, with a temp directory of its own."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap

import pytest
import torch

import raylit as pl


def pytest_configure():
    """Let signals have their usual effect in scripts of the tests, also where the test run itself ignores them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _ray_node_of_our_own():
    # Ray keeps sockets there, whose paths may not exceed 107 characters.
    directory = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    os.environ["RAY_TMPDIR"] = directory
    os.environ.pop("RAY_ADDRESS", None)
    yield
    pl.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def _clean_process(tmp_path, monkeypatch):
    """Runs write below the current directory, and draw from the global generators."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    has_default_device = "PJRT_SELECT_DEFAULT_DEVICE" in os.environ
    yield
    torch.use_deterministic_algorithms(False)
    if not has_default_device:  # set by accelerator="xla" for this process and its workers, which are new ones then
        os.environ.pop("PJRT_SELECT_DEFAULT_DEVICE", None)


@pytest.fixture
def quiet():
    """Trainer arguments for a run that writes and shows nothing."""
    switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return dict.fromkeys(switches, False)


@pytest.fixture
def run_script(tmp_path):
    """Run a script as a user would, in a process of its own; returns what it printed. Fails if the script does."""

    def run(source, *, timeout_s=100.0):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(source))
        done = subprocess.run(
            [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
