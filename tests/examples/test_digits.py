"""The first thing a newcomer runs."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "digits.py"


@pytest.mark.timeout(180)
def test_digits_learns_on_two_workers(tmp_path: pathlib.Path) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), "--num-workers", "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=170,
    )
    assert result.returncode == 0, result.stdout
    accuracy = re.search(r"^test accuracy: (\S+)$", result.stdout, re.MULTILINE)
    assert accuracy is not None, result.stdout
    assert float(accuracy[1]) > 0.95, result.stdout
    checkpoint = re.search(r"^checkpoint: (.+)$", result.stdout, re.MULTILINE)
    assert checkpoint is not None, result.stdout
    assert os.path.isfile(tmp_path / checkpoint[1])
    assert list(tmp_path.glob("lightning_logs/version_0/events.out.tfevents.*"))
