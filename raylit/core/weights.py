"""Weights in safetensors files, which other libraries read and whose loading runs no code. Driver."""

import importlib
import os
import posixpath
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor, nn

from raylit.checkpoint import files
from raylit.core.hparams import load_weights
from raylit.errors import CheckpointError, ConfigError, RaylitError
from raylit.storage import file_system, is_object_store, is_url

_SUFFIX = ".safetensors"


def write_weights(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the module's state dict to a safetensors file, each tensor once.

    The other names of a tied weight are stored in the metadata, as in safetensors' own `save_model`. A local file is
    renamed into place when it is complete, an object at a URL appears when its upload ends.

    Raises:
        CheckpointError: if it cannot be written.
        ConfigError: if the state contains something other than tensors with values.
    """
    save_file = _import_safetensors("torch").save_file
    tensors, names = _collect_tensors(module)
    with _open_target(os.fspath(path)) as file:
        save_file(tensors, os.fspath(file), metadata={"format": "pt", **names})


def read_weights(module: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Load a safetensors file, or a checkpoint's weights, into the module's own tensors.

    Raises:
        CheckpointError: if the file is missing, damaged or of another model.
    """
    text = os.fspath(path)
    state_dict = _read_safetensors(text) if text.endswith(_SUFFIX) else files.read(text)["state_dict"]
    load_weights(module, state_dict, source=text, strict=strict)


def _import_safetensors(part: str) -> Any:
    try:
        return importlib.import_module(f"safetensors.{part}" if part else "safetensors")
    except ImportError as error:
        raise RaylitError(
            f"{_SUFFIX} files need a package that is missing: pip install 'raylit[safetensors]'"
        ) from error


def _collect_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors by name, and for each further name of a tensor the name under which it is stored."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    names_by_view: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in module.state_dict().items():
        if type(tensor) is not Tensor or tensor.is_meta:
            what = "a tensor without values" if type(tensor) is Tensor else f"a {type(tensor).__name__}"
            raise ConfigError(f"save_weights: {name} is {what}; use save_checkpoint, which keeps other state as well")
        address = tensor.untyped_storage().data_ptr()
        view = (address, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and view in names_by_view:
            names[name] = names_by_view[view]
            continue
        names_by_view[view] = name
        # Tensors that share memory in part are stored separately.
        is_apart = (
            address not in storages and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
        )
        storages.add(address)
        tensors[name] = tensor.detach().cpu().contiguous() if is_apart else tensor.detach().cpu().contiguous().clone()
    return tensors, names


@contextmanager
def _open_target(path: str) -> Iterator[Path]:
    """Yield a local path to write to, which becomes `path` after the block."""
    try:
        if not is_url(path):
            target = Path(path).expanduser()
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
            try:
                yield temporary
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory(prefix="raylit-") as directory:
            yield Path(directory) / "weights"
            store, place = file_system(path)
            if not is_object_store(store):
                store.makedirs(posixpath.dirname(place), exist_ok=True)
            store.put_file(os.fspath(Path(directory) / "weights"), place)
    except Exception as error:  # of whatever kind the store's own library raises
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"cannot write the weights to {path}: {type(error).__name__}: {reason}") from error


def _read_safetensors(path: str) -> dict[str, Tensor]:
    safe_open = _import_safetensors("").safe_open
    try:
        with _download(path) as file, safe_open(os.fspath(file), framework="pt", device="cpu") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            names = opened.metadata() or {}
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            raise CheckpointError(f"there is no file {path}") from error
        raise CheckpointError(f"cannot read the weights in {path}: {type(error).__name__}: {error}") from error
    return {**tensors, **{name: tensors[target] for name, target in names.items() if target in tensors}}


@contextmanager
def _download(path: str) -> Iterator[Path]:
    if not is_url(path):
        yield Path(path).expanduser()
        return
    with tempfile.TemporaryDirectory(prefix="raylit-") as directory:
        copy = Path(directory) / "weights"
        store, place = file_system(path)
        store.get_file(place, os.fspath(copy))
        yield copy
