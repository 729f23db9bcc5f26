"""Map the Trainer's argument names of Lightning 0.9 to today's, and refuse names that raylit does not have. Driver."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, ParamSpec, TypedDict, cast

from raylit.callbacks.argument_callbacks import ModelSummary
from raylit.callbacks.early_stopping import EarlyStopping
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.progress_bar import ProgressBar
from raylit.errors import ConfigError, UnknownArgumentError
from raylit.trainer.arguments.training import check_count

_Parameters = ParamSpec("_Parameters")


class EarlierNames(TypedDict, total=False):
    """Trainer arguments under their names of Lightning 0.9; each docstring gives the name that replaces it."""

    checkpoint_callback: bool | ModelCheckpoint
    """Replaced by `enable_checkpointing`."""
    early_stop_checkpoint: bool | EarlyStopping
    """Replaced by `early_stop_callback`."""
    progress_bar_refresh_rate: int | None
    """Batches between two updates of the bar; 0: no bar. Replaced by `enable_progress_bar`."""
    weights_summary: Literal["top", "full"] | None
    """The depth of the summary; None: no summary. Replaced by `enable_model_summary`."""
    distributed_backend: str | None
    """Replaced by `strategy`."""
    replace_sampler_ddp: bool
    """Replaced by `use_distributed_sampler`."""
    reload_dataloaders_every_epoch: bool
    """Replaced by `reload_dataloaders_every_n_epochs`: True is 1, False is 0."""


_ABSENT: dict[str, tuple[Any, str]] = {
    "plugins": (
        None,
        "say precision=, strategy= (a name, DDPStrategy(...) or FSDPStrategy(...)) or checkpoint_async= for what they "
        "do; Ray places and starts the processes",
    ),
    "barebones": (
        False,
        "say logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False and "
        "num_sanity_val_steps=0",
    ),
    "enable_autolog_hparams": (True, "self.save_hyperparameters(logger=False) keeps them from the loggers"),
    "model_registry": (None, "checkpoints go to a path or URL: ModelCheckpoint(dirpath=...)"),
    "amp_backend": ("native", "torch's own autocast is the one: say precision='16-mixed' or 'bf16-mixed'"),
    "auto_select_gpus": (False, "Ray picks free GPUs: say gpus= or devices= with their number"),
    "stochastic_weight_avg": (False, "say callbacks=StochasticWeightAveraging(swa_lrs=...)"),
    "weights_save_path": (None, "say callbacks=ModelCheckpoint(dirpath=...)"),
    "process_position": (0, "bars stand one below the other by themselves"),
    "train_percent_check": (1.0, "it is limit_train_batches"),
    "val_percent_check": (1.0, "it is limit_val_batches"),
    "test_percent_check": (1.0, "it is limit_test_batches"),
    "row_log_interval": (50, "it is log_every_n_steps"),
}
"""Lightning's arguments that raylit does not have: the default, which is ignored, and what the error advises."""
_NONE_HAS_A_MEANING = frozenset({"check_val_every_n_epoch"})
"""Arguments for which None is a value of its own; for all others None stands for the default, as in Lightning."""


def accepts_earlier_names(init: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
    """Decorate the Trainer's constructor so that it receives today's names only; None is left out as the default.

    Raises:
        UnknownArgumentError: If a name is neither today's nor one of Lightning 0.9's.
        ConfigError: If two names of one argument are given with different values.
    """
    known = [name for name in inspect.signature(init).parameters if name not in ("self", "earlier")]

    @functools.wraps(init)
    def construct(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
        cast(Callable[..., None], init)(*args, **_translate_names(kwargs, known))

    return construct


def resolve_aliases(**named: Any) -> Any:
    """Return the value of an argument that has several names; None if none of them is given.

    Raises:
        ConfigError: If two of the names are given with different values.
    """
    given = [(name, value) for name, value in named.items() if value is not None]
    for name, value in given[1:]:
        first_name, first = given[0]
        is_plain = isinstance(value, (str, int, float)) and isinstance(first, (str, int, float))
        if value is not first and not (is_plain and value == first):
            raise ConfigError(f"{first_name} and {name} are two names of one thing and were given two values: keep one")
    return given[0][1] if given else None


def _translate_names(given: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    arguments = {}
    for name, value in given.items():
        if name in _ABSENT and (value is None or value == _ABSENT[name][0]):
            continue
        if name not in known and name not in _RENAMED:
            _refuse_unknown(name, [*known, *_RENAMED])
        if name in known and (value is not None or name in _NONE_HAS_A_MEANING):
            arguments[name] = value
    for name in given:
        if name not in _RENAMED:
            continue
        today, translate = _RENAMED[name]
        value = translate(given[name])
        if value is None:
            continue
        if today in arguments:
            value = _merge_values(value, arguments[today], f"{name}={given[name]!r} and {today}={arguments[today]!r}")
        arguments[today] = value
    return arguments


def _refuse_unknown(name: str, known: Iterable[str]) -> None:
    if name in _ABSENT:
        raise UnknownArgumentError(f"Trainer has no argument {name!r}: {_ABSENT[name][1]}")
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see help(raylit.Trainer) for those that it has"
    raise UnknownArgumentError(f"Trainer has no argument {name!r}: {hint}")


def _merge_values(left: Any, right: Any, names: str) -> Any:
    """Return the more exact value of the two: a callback is more exact than True."""
    is_switch = isinstance(left, bool) or isinstance(right, bool)
    if bool(left) != bool(right) if is_switch else left is not right and left != right:
        raise ConfigError(f"{names} are two names of one thing and contradict each other: keep one")
    return right if isinstance(left, bool) else left


def _keep_value(value: Any) -> Any:
    return value


def _make_progress_bar(refresh_rate: Any) -> bool | ProgressBar | None:
    if refresh_rate is None:
        return None
    check_count(0, progress_bar_refresh_rate=refresh_rate)
    return ProgressBar(refresh_rate=refresh_rate) if refresh_rate else False


def _make_model_summary(mode: Any) -> bool | ModelSummary:
    if mode not in (None, "top", "full"):
        raise ConfigError(f"weights_summary={mode!r}: must be 'top', 'full' or None (off)")
    return ModelSummary(max_depth=1 if mode == "top" else -1) if mode else False


def _translate_backend(backend: Any) -> str | None:
    if backend in ("dp", "ddp2", "horovod"):
        raise ConfigError(f"distributed_backend={backend!r}: raylit has one process per device; use 'ddp'")
    return "ddp" if backend in ("ddp_cpu", "ddp_spawn") else backend


def _translate_reload(is_every_epoch: Any) -> int | None:
    return None if is_every_epoch is None else int(bool(is_every_epoch))


_RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "checkpoint_callback": ("enable_checkpointing", _keep_value),
    "early_stop_checkpoint": ("early_stop_callback", _keep_value),
    "progress_bar_refresh_rate": ("enable_progress_bar", _make_progress_bar),
    "weights_summary": ("enable_model_summary", _make_model_summary),
    "distributed_backend": ("strategy", _translate_backend),
    "replace_sampler_ddp": ("use_distributed_sampler", _keep_value),
    "reload_dataloaders_every_epoch": ("reload_dataloaders_every_n_epochs", _translate_reload),
}
"""By the name of Lightning 0.9: today's name, and a function that translates the value (None: today's default)."""
