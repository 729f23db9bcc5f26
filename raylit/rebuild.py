"""Modules and data modules from their checkpoints: rebuilt with the saved hyper-parameters, then their weights. Both
sides."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from raylit.checkpoint import files, format
from raylit.errors import CheckpointError
from raylit.hparams import constructor_arguments

_Owner = TypeVar("_Owner")


def read_for_rebuild(
    path: str | Path, *, hparams_file: str | Path | None, overrides: Mapping[str, Any], allow_pickle: bool
) -> dict[str, Any]:
    """The checkpoint; its hyper-parameters unpacked, those of the file instead where one is given."""
    checkpoint = files.read(path, allow_pickle=allow_pickle)
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        saved = checkpoint.get(key, {})
        if not isinstance(saved, dict):
            raise CheckpointError(f"{path} holds {key} of type {type(saved).__name__}: must be a dict")
        # What is given anew need not be readable.
        packed = {name: value for name, value in saved.items() if name not in overrides}
        checkpoint[key] = format.unpack_hyper_parameters(packed, allow_pickle=allow_pickle)
    if hparams_file is not None:
        checkpoint["hyper_parameters"] = hyperparameters_in(Path(hparams_file))
    return checkpoint


def rebuilt(
    cls: type[_Owner], hparams: Mapping[str, Any], name: str, *, overrides: Mapping[str, Any], source: str
) -> _Owner:
    """An instance from saved hyper-parameters, which `overrides` win over. CheckpointError: an argument is missing."""
    try:
        return cls(**constructor_arguments(cls, hparams, name, overrides))
    except TypeError as error:
        raise CheckpointError(
            f"{cls.__name__} cannot be rebuilt from {source}: {error}. It holds the hyper-parameters "
            f"{sorted(map(str, hparams))}; call self.save_hyperparameters() in __init__, or pass what is missing here"
        ) from error


def hyperparameters_in(file: Path) -> dict[str, Any]:
    """Of a YAML file, or a CSV file with the columns key and value."""
    if not file.is_file():
        raise CheckpointError(f"hparams_file={os.fspath(file)!r}: there is no such file")
    # Only when there is something to read: importing raylit should not cost the import of yaml.
    import yaml

    with open(file, encoding="utf-8", newline="") as stream:
        try:
            if file.suffix in (".yaml", ".yml"):
                values = yaml.safe_load(stream) or {}
            elif file.suffix == ".csv":
                values = {row["key"]: yaml.safe_load(row["value"]) for row in csv.DictReader(stream)}
            else:
                raise CheckpointError(f"hparams_file={os.fspath(file)!r}: must be a .yaml or a .csv file")
        except (yaml.YAMLError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"hparams_file={os.fspath(file)!r} cannot be read: {error}. It must hold plain values, of which no "
                "Python objects are made; a CSV file has the columns key and value"
            ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"hparams_file={os.fspath(file)!r} holds no hyper-parameters by name")
    return values


def load_weights(module: nn.Module, state_dict: Mapping[str, Tensor], *, source: str, strict: bool = True) -> None:
    """Load into the module's own tensors. CheckpointError names the first keys that do not fit."""
    check_weights(module, state_dict, source=source, strict=strict)
    module.load_state_dict(state_dict, strict=strict)


def check_weights(module: nn.Module, state_dict: Mapping[str, Tensor], *, source: str, strict: bool = True) -> None:
    """CheckpointError names the first keys that do not fit."""
    own = module.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    other_shape = [
        f"{key} ({tuple(value.shape)} instead of {tuple(own[key].shape)})"
        for key, value in state_dict.items()
        if key in own and not nn.parameter.is_lazy(own[key]) and _shape(value) != _shape(own[key])
    ]
    if other_shape or (strict and (missing or unexpected)):
        wrong = {"missing": missing, "unexpected": unexpected, "of another shape": other_shape}
        raise CheckpointError(
            f"{source} is not a checkpoint of this {type(module).__name__}: "
            + ", ".join(f"{what} {_first(keys)}" for what, keys in wrong.items() if keys)
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _first(keys: list[str], *, count: int = 3) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")
