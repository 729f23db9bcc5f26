"""What accelerator="xla" says where it cannot work; no torch_xla is needed."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import raylit as pl
from raylit.accelerators.registry import explain_missing_xla
from raylit.worker.collectives import require_reachable


def test_a_missing_torch_xla_is_a_config_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    monkeypatch.delitem(sys.modules, "raylit.accelerators.xla", raising=False)
    with pytest.raises(pl.ConfigError, match=r"not installed: pip install 'raylit\[xla\]'"):
        pl.Trainer(accelerator="xla")


def test_a_torch_xla_of_another_torch_is_a_config_error(tmp_path):
    """A stand-in whose import fails as the library's does, in a process that has not imported the real one."""
    (tmp_path / "torch_xla").mkdir()
    (tmp_path / "torch_xla" / "__init__.py").write_text(
        "raise ImportError('/x/_XLAC.so: undefined symbol: _ZN5torch4lazy')"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import raylit\n"
        "try: raylit.Trainer(accelerator='xla')\n"
        "except raylit.ConfigError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert f"does not fit torch {torch.__version__} (/x/_XLAC.so: undefined symbol" in done.stdout, done.stderr
    assert "install the torch" in done.stdout


def test_the_torch_that_fits_is_named(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.0")
    text = explain_missing_xla(ImportError("undefined symbol: _ZN5torch4lazy"))
    assert text.startswith("torch_xla 2.9.0 does not fit torch ")
    assert text.endswith("pip install 'torch==2.9.*'")


def test_collectives_refuse_tensors_on_xla():
    require_reachable(torch.zeros(2))
    with pytest.raises(pl.ModuleError, match="with a tensor on XLA"):
        require_reachable(SimpleNamespace(device=torch.device("xla")))
