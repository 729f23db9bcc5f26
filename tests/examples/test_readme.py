"""The README's sample, as it stands there but in one process."""

import pathlib
import re
from collections.abc import Callable

import pytest

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_sample_learns_the_line(run_script: Callable[[str], str]) -> None:
    sample, *_ = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert "num_workers=2" in sample
    weight = re.search(r"tensor\(\[\[([\d.]+)\]\]", run_script(sample.replace("num_workers=2", "num_workers=0")))
    assert weight is not None
    assert float(weight[1]) == pytest.approx(3.0, abs=0.01)
