"""Contents of a checkpoint: keys, format version, conversion to and from plain values. Driver and workers."""

import enum
import importlib
import random
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from raylit.accelerators import Accelerator
from raylit.errors import CheckpointError
from raylit.protocol.messages import Saved
from raylit.protocol.state import Progress

FORMAT = 1
"""Format version; it goes up when an older raylit could no longer resume from what this one writes."""
LOGS = "raylit.logs"
"""Key of the loggers' positions among the states of the driver's callbacks, before they are put into a checkpoint."""

SCALER = "MixedPrecision"
"""Lightning's key for the state of the gradient scaler."""

_WRAPPER = "__raylit__"
"""Key that marks a dict as the stand-in for a hyper-parameter of another type."""

_AS_IT_IS = (type(None), bool, float, str, complex, bytearray, torch.Size, torch.dtype, torch.device, torch.layout)
_MAX_INT_BITS = 8 * 255 - 1
"""Largest integer that torch.save's pickle protocol stores in a form that weights_only reads."""


def merge(saved: Sequence[Saved], driver_part: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the parts into a whole checkpoint: rank 0's part, each rank's own state, and the driver's part, which wins.

    `progress` (Progress.to_dict()) and `seed` (of the sample order) are moved to the entry `raylit`.

    Raises:
        CheckpointError: if a value is not plain, or two callbacks share a key.
    """
    parts = sorted(saved, key=lambda part: part.rank)
    assert [part.rank for part in parts] == list(range(len(parts))), "one part of each rank"
    checkpoint = {**parts[0].checkpoint, **driver_part}
    of_workers, of_driver = parts[0].checkpoint.get("callbacks", {}), driver_part.get("callbacks", {})
    if clash := sorted(of_workers.keys() & of_driver.keys()):
        raise CheckpointError(
            f"a Callback and a DriverCallback share the state key {clash[0]!r}: override `state_key` in one of them"
        )
    if "callbacks" in checkpoint:
        checkpoint["callbacks"] = {**of_workers, **of_driver}
    progress = checkpoint.pop("progress", None) or read_progress(checkpoint).to_dict()
    checkpoint["raylit_version"] = _read_version()
    checkpoint["raylit"] = {
        "format": FORMAT,
        "progress": progress,
        "seed": checkpoint.pop("seed", None),
        "ranks": [part.of_rank for part in parts],
    }
    whole: dict[str, Any] = to_plain_values(checkpoint, "checkpoint")
    return whole


def complete(checkpoint: dict[str, Any], others: Sequence[Mapping[str, Any]], callbacks: Mapping[str, Any]) -> None:
    """Add the own states of ranks 1 and up and the driver's callback states to a checkpoint merged from rank 0's part.

    Both are plain values. Under LOGS the callback states contain the loggers' positions.
    """
    checkpoint["raylit"]["ranks"][1:] = others
    if LOGS in callbacks:
        checkpoint["raylit"]["logs"] = callbacks[LOGS]
    states = {key: state for key, state in callbacks.items() if key != LOGS}
    if states:
        checkpoint["callbacks"] = {**checkpoint.get("callbacks", {}), **states}


def checkpoint_from_weights(
    state_dict: Mapping[str, Any], progress: Progress, *, module: Any, datamodule: Any
) -> dict[str, Any]:
    """Return the entries of every checkpoint: weights, progress, and hyper-parameters of module and data module."""
    checkpoint: dict[str, Any] = {
        "epoch": progress.epoch,
        "global_step": progress.global_step,
        "state_dict": state_dict,
        "progress": progress.to_dict(),
    }
    for prefix, owner in (("", module), ("datamodule_", datamodule)):
        if owner is not None and owner.find_hparams() is not None:
            checkpoint[f"{prefix}hparams_name"] = owner.find_hparams_argument()
            checkpoint[f"{prefix}hyper_parameters"] = pack_hyper_parameters(owner.hparams)
    return checkpoint


def drop_run_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checkpoint with weights and hyper-parameters only, as `save_weights_only` writes it."""
    of_run = ("optimizer_states", "lr_schedulers", "callbacks", "scaler")
    weights = {name: value for name, value in checkpoint.items() if name not in of_run}
    about = {**checkpoint["raylit"], "seed": None, "ranks": [{} for _ in checkpoint["raylit"]["ranks"]]}
    return {**weights, "raylit": about}


def read_progress(checkpoint: Mapping[str, Any]) -> Progress:
    """Return the saved run's progress, computed from the loop states for checkpoints of Lightning."""
    if "raylit" in checkpoint:
        field_names = {field.name for field in fields(Progress)}
        return Progress(
            **{name: value for name, value in checkpoint["raylit"]["progress"].items() if name in field_names}
        )
    epoch, global_step = checkpoint.get("epoch", 0), checkpoint.get("global_step", 0)
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs = loop.get("epoch_progress", {}).get("current", {})
    batches = loop.get("epoch_loop.batch_progress", {})
    # In the hook in which checkpoints are saved, "completed" is still one less than "processed".
    num_done = batches.get("current", {}).get("processed", 0)
    is_inside = num_done > 0 and not batches.get("is_last_batch", True)
    if 0 < epochs.get("ready", 0) == epochs.get("processed"):
        # After the last epoch Lightning has incremented "epoch" already.
        epoch, is_inside = epochs["processed"] - 1, False
    return Progress(
        epoch=epoch,
        global_step=global_step,
        window=global_step,
        batch=num_done,
        batch_in_all=max(num_done, batches.get("total", {}).get("processed", 0)),
        is_epoch_ended=not is_inside,
    )


def read_rank_states(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each rank's own state in the saved run, in rank order; empty for checkpoints of Lightning."""
    ranks: list[dict[str, Any]] = checkpoint.get("raylit", {}).get("ranks", [])
    return ranks


def read_metrics(checkpoint: Mapping[str, Any]) -> dict[str, float]:
    """Return the last reduced value of every metric in the saved run."""
    ranks = read_rank_states(checkpoint)
    values: dict[str, float] = ranks[0].get("reduced", {}).get("values", {}) if ranks else {}
    return dict(values)


def read_log_positions(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the positions of the saved run's loggers, by logger index; empty for checkpoints of Lightning."""
    positions: dict[str, Any] = checkpoint.get("raylit", {}).get("logs", {})
    return positions


def read_seed(checkpoint: Mapping[str, Any]) -> int | None:
    """Return the seed of the saved run's sample order; None for checkpoints of Lightning."""
    seed: int | None = checkpoint.get("raylit", {}).get("seed")
    return seed


def read_scaler_state(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the gradient scaler's state, also under its key before Lightning 1.6; None if the run had no scaler."""
    state: dict[str, Any] | None = checkpoint.get(SCALER, checkpoint.get("native_amp_scaling_state"))
    return state


def to_plain_values(value: Any, where: str) -> Any:
    """Return the value in types that weights_only reads; `where` names it in errors.

    Containers are rebuilt. Tensors keep their storage (so that shared weights are stored once) but lose gradient and
    attributes. NumPy arrays become tensors and NumPy scalars Python numbers, paths become strings, subclasses of dict
    become dicts (OrderedDict and Counter stay).

    Raises:
        CheckpointError: for any other type.
    """
    kind = type(value)
    if kind in _AS_IT_IS:
        return value
    if isinstance(value, Tensor):
        if kind not in (Tensor, nn.Parameter):
            raise _make_type_error(value, where, "store an ordinary tensor")
        return value.detach()
    if isinstance(value, dict):
        return _convert_dict(value, where)
    if kind in (list, tuple):
        return kind(to_plain_values(item, f"{where}[{index}]") for index, item in enumerate(value))
    if kind is set:
        return {to_plain_values(item, f"an element of {where}") for item in value}
    return _convert_leaf(value, where)


def pack_hyper_parameters(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyper-parameters in types that weights_only reads.

    Plain values are kept; others are cloudpickled into a uint8 tensor, which weights_only reads as data. A value that
    cannot be pickled either is left out with a warning, as the constructor's caller can pass it again.
    """
    packed = {}
    for name, value in hparams.items():
        try:
            packed[name] = _pack(value, name)
        except Exception as error:
            warnings.warn(
                f"the hyper-parameter {name!r} ({type(value).__name__}) cannot be pickled and is left out of the "
                f"checkpoint: {error}. Pass save_hyperparameters(ignore=[{name!r}]) and give it again on loading",
                stacklevel=2,
            )
    return packed


def unpack_hyper_parameters(packed: Mapping[str, Any], *, allow_pickle: bool = False) -> dict[str, Any]:
    """Return the hyper-parameters that `pack_hyper_parameters` has packed.

    Raises:
        CheckpointError: if a value is pickled and `allow_pickle` is False.
    """
    pickled = [name for name, value in packed.items() if _read_wrapper(value) == "pickle"]
    if pickled and not allow_pickle:
        raise CheckpointError(
            "these hyper-parameters are pickled objects, whose loading can run code: "
            + ", ".join(f"{name} ({packed[name]['type']})" for name in pickled)
            + ". For a file that you trust, pass weights_only=False"
        )
    return {name: _unpack(value, name) for name, value in packed.items()}


def random_state(accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Return the states of this process's generators: Python, torch, NumPy if imported, and the accelerator's device.

    The device's state has the accelerator's name as key; without an accelerator only the host's states are returned.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        state["numpy"] = to_plain_values(sys.modules["numpy"].random.get_state(legacy=False), "numpy.random")
    of_device = None if accelerator is None else accelerator.random_state()
    if accelerator is not None and of_device is not None:
        state[accelerator.name] = of_device
    return state


def set_random_state(state: Mapping[str, Any], accelerator: Accelerator | None = None) -> None:
    """Restore what `random_state()` returned; the state of another accelerator's device is ignored."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        importlib.import_module("numpy").random.set_state(_to_arrays(state["numpy"]))
    if accelerator is not None and accelerator.name in state and accelerator.is_available():
        accelerator.set_random_state(state[accelerator.name])


def _read_version() -> str:
    try:
        return metadata.version("raylit")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _convert_dict(value: dict[Any, Any], where: str) -> dict[Any, Any]:
    items = {}
    for key, item in value.items():
        plain_key = to_plain_values(key, f"the key {key!r} of {where}")
        if isinstance(plain_key, Tensor):
            raise _make_type_error(key, f"a key of {where}", "use its .item()")
        items[plain_key] = to_plain_values(item, f"{where}[{key!r}]")
    if type(value) is Counter:  # MultiStepLR's milestones
        return Counter(items)
    if not isinstance(value, OrderedDict):
        return items
    ordered = OrderedDict(items)
    vars(ordered).update(
        to_plain_values(vars(value), f"vars({where})")
    )  # the state dict's _metadata: version numbers of its modules
    return ordered


def _convert_leaf(value: Any, where: str) -> Any:
    if isinstance(value, enum.Enum):
        raise _make_type_error(value, where, "store its .value")
    if isinstance(value, PurePath):
        return str(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        # Copied to native byte order: torch accepts no foreign byte order, negative strides or read-only memory.
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C", copy=True))
    if numpy is not None and isinstance(value, numpy.generic) and type(item := value.item()) is not type(value):
        return to_plain_values(item, where)
    if isinstance(value, bytes):
        return value or bytearray()  # pickle stores empty bytes by a call that weights_only refuses
    if isinstance(value, int) and value.bit_length() <= _MAX_INT_BITS:
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    raise _make_type_error(value, where, "store numbers, strings, tensors, lists or dicts of it")


def _make_type_error(value: Any, where: str, advice: str) -> CheckpointError:
    kind = type(value)
    return CheckpointError(
        f"{where} is of type {kind.__module__}.{kind.__qualname__}, which torch.load(weights_only=True) refuses to "
        f"read: {advice}, in the state_dict or on_save_checkpoint that it comes from"
    )


def _pack(value: Any, name: str) -> Any:
    if isinstance(value, PurePath):
        return {_WRAPPER: "path", "data": str(value)}
    if _read_wrapper(value) is None:
        try:
            return to_plain_values(value, name)
        except CheckpointError:
            pass  # it is pickled below
    data = torch.frombuffer(bytearray(cloudpickle.dumps(value)), dtype=torch.uint8)
    return {_WRAPPER: "pickle", "type": f"{type(value).__module__}.{type(value).__qualname__}", "data": data}


def _unpack(value: Any, name: str) -> Any:
    kind = _read_wrapper(value)
    if kind == "path":
        return Path(value["data"])
    if kind != "pickle":
        return value
    try:
        return cloudpickle.loads(bytes(value["data"].tolist()))
    except Exception as error:
        raise CheckpointError(
            f"the hyper-parameter {name!r} ({value['type']}) cannot be unpickled here: {error}. Make its class and "
            "what belongs to it importable, as it was when the checkpoint was written"
        ) from error


def _read_wrapper(value: Any) -> str | None:
    return value.get(_WRAPPER) if isinstance(value, dict) else None


def _to_arrays(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {name: _to_arrays(item) for name, item in value.items()}
    return value
