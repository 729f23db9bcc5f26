"""Parse and check the Trainer's arguments of the loop, one function for each group of the Plan. Driver.

`parse_limits`: epochs, steps, time and batches. `parse_validation`: when validation runs. `parse_strategy`: how workers
share the model. `parse_optimization`: accumulation, clipping, precision and compilation. `build_plan`: the arguments of
no group, on logging, data, determinism and saving. `parse_searches`: learning rate and batch size.
"""

import math
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, get_args

from raylit.callbacks.timer import Duration, parse_seconds
from raylit.config import (
    NAMED_STRATEGIES,
    BatchLimit,
    CombinationName,
    DDPStrategy,
    FSDPStrategy,
    Limits,
    MatmulPrecisionName,
    Optimization,
    Plan,
    PrecisionName,
    RegisteredStrategy,
    Reporting,
    SingleDeviceStrategy,
    SPMDStrategy,
    StrategyOptions,
    Validation,
    Workers,
)
from raylit.errors import ConfigError
from raylit.strategies import registered_strategies


def parse_limits(
    *,
    max_epochs: int | None,
    min_epochs: int | None,
    max_steps: int,
    min_steps: int | None,
    max_time: Duration | None,
    limit_train_batches: BatchLimit,
    limit_val_batches: BatchLimit,
    limit_test_batches: BatchLimit,
    limit_predict_batches: BatchLimit,
    overfit_batches: BatchLimit,
    num_sanity_val_steps: int,
    fast_dev_run: bool | int,
) -> Limits:
    """Parse the limits: Lightning's -1 and None for "no limit" become None; without any limit there are 1000 epochs."""
    check_count(0, min_epochs=min_epochs or 0, min_steps=min_steps or 0)
    check_count(-1, max_epochs=0 if max_epochs is None else max_epochs, max_steps=max_steps)
    check_count(-1, num_sanity_val_steps=num_sanity_val_steps)
    check_count(0, fast_dev_run=int(fast_dev_run) if isinstance(fast_dev_run, bool) else fast_dev_run)
    check_share(
        limit_train_batches=limit_train_batches,
        limit_val_batches=limit_val_batches,
        limit_test_batches=limit_test_batches,
        limit_predict_batches=limit_predict_batches,
        overfit_batches=overfit_batches,
    )
    max_time_s = None if max_time is None else parse_seconds(max_time, name="max_time")
    if fast_dev_run:
        return _build_dev_run_limits(int(fast_dev_run))
    if max_epochs is None:
        max_epochs = 1000 if max_steps == -1 and max_time_s is None else -1
    return Limits(
        max_epochs=None if max_epochs == -1 else max_epochs,
        min_epochs=min_epochs or 0,
        max_steps=None if max_steps == -1 else max_steps,
        min_steps=min_steps or 0,
        max_time_s=max_time_s,
        train_batches=limit_train_batches,
        val_batches=limit_val_batches,
        test_batches=limit_test_batches,
        predict_batches=limit_predict_batches,
        overfit_batches=overfit_batches,
        sanity_val_batches=num_sanity_val_steps,
    )


def parse_validation(
    *, val_check_interval: BatchLimit | Duration, check_val_every_n_epoch: int | None, fast_dev_run: bool | int
) -> Validation:
    """Parse the interval of validation: a fraction of the epoch above 0, a positive count of batches, or a time."""
    if check_val_every_n_epoch is not None:
        check_count(1, check_val_every_n_epoch=check_val_every_n_epoch)
    if isinstance(val_check_interval, (str, dict, timedelta)):
        interval_s = parse_seconds(val_check_interval, name="val_check_interval")
        if interval_s == 0:
            raise ConfigError(f"val_check_interval={val_check_interval!r}: no time at all; 1 is after every batch")
        validation = Validation(interval_s=interval_s, every_n_epochs=check_val_every_n_epoch)
        return Validation() if fast_dev_run else validation
    is_fraction = isinstance(val_check_interval, float)
    if not is_fraction and (isinstance(val_check_interval, bool) or not isinstance(val_check_interval, int)):
        raise ConfigError(
            f"val_check_interval={val_check_interval!r}: must be a float in (0, 1], an int, or a time "
            '("DD:HH:MM:SS", a timedelta or a dict of its keywords)'
        )
    if (is_fraction and not 0 < val_check_interval <= 1) or (not is_fraction and val_check_interval < 1):
        raise ConfigError(
            f"val_check_interval={val_check_interval!r}: must be a float in (0, 1] or an int of at least 1; "
            "limit_val_batches=0 turns validation off"
        )
    if fast_dev_run:
        return Validation()
    if check_val_every_n_epoch is None and is_fraction:
        raise ConfigError(
            f"val_check_interval={val_check_interval!r} with check_val_every_n_epoch=None, which counts batches across "
            "epochs: give the interval as an int, or as a time"
        )
    return Validation(interval=val_check_interval, every_n_epochs=check_val_every_n_epoch)


def _build_dev_run_limits(num_batches: int) -> Limits:
    return Limits(
        max_epochs=1,
        train_batches=num_batches,
        val_batches=num_batches,
        test_batches=num_batches,
        predict_batches=num_batches,
        sanity_val_batches=0,
    )


_UNUSED = "_find_unused_parameters_"


def parse_strategy(*, strategy: str | StrategyOptions, workers: Workers) -> StrategyOptions:
    """One worker has nothing to share, whatever strategy is given."""
    chosen = _find_strategy(strategy) if isinstance(strategy, str) else strategy
    if chosen is not None and not isinstance(chosen, StrategyOptions):
        raise ConfigError(f"strategy={strategy!r}: must be a name such as 'ddp' or an object such as DDPStrategy(...)")
    if isinstance(chosen, SingleDeviceStrategy) and workers.num_workers > 1:
        raise ConfigError(f"strategy={strategy!r} with {workers.num_workers} workers: use 'ddp' or 'auto'")
    if workers.accelerator.is_spmd:
        return _build_spmd_strategy(chosen, strategy=strategy)
    if workers.num_workers <= 1:
        return SingleDeviceStrategy()
    return chosen or DDPStrategy(find_unused_parameters="auto")


def _build_spmd_strategy(chosen: StrategyOptions | None, *, strategy: str | StrategyOptions) -> SPMDStrategy:
    """Derive what the devices of a worker share; options of torch's wrappers have no meaning there."""
    if isinstance(chosen, SPMDStrategy):
        return chosen
    if isinstance(chosen, FSDPStrategy):
        # The format of checkpoints is no matter of the training: they are single files.
        if replace(chosen, state_dict_type="sharded") != FSDPStrategy():
            raise ConfigError(
                f"strategy={strategy!r} on XLA, which divides the parameters by itself and has none of these options: "
                "use strategy='fsdp'"
            )
        return SPMDStrategy(is_sharding_parameters=True)
    is_plain = not isinstance(chosen, DDPStrategy) or replace(chosen, find_unused_parameters=False) == DDPStrategy()
    if isinstance(chosen, RegisteredStrategy) or not is_plain:
        raise ConfigError(f"strategy={strategy!r} does not work on XLA: use 'auto', 'ddp' or 'fsdp'")
    return SPMDStrategy()


def _find_strategy(given: str) -> StrategyOptions | None:
    name, has_suffix, is_finding = given.partition(_UNUSED)
    known = {**NAMED_STRATEGIES, **registered_strategies()}
    chosen = known.get(name)
    if name not in known or (has_suffix and (is_finding not in ("true", "false") or chosen != DDPStrategy())):
        names = ", ".join(map(repr, known))
        raise ConfigError(
            f"strategy={given!r}: must be one of {names}, of the ddp ones also with '{_UNUSED}true' at its end, or an "
            "object such as DDPStrategy(bucket_cap_mb=50)"
        )
    return DDPStrategy(find_unused_parameters=True) if is_finding == "true" else chosen


_PRECISIONS: dict[str, PrecisionName] = {
    "32": "32-true",
    "64": "64-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    **{name: name for name in ("32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")},
}
_COMPILE_OPTIONS = ("backend", "mode", "options", "dynamic", "fullgraph", "disable")


def parse_optimization(
    *,
    accumulate_grad_batches: int | dict[int, int],
    gradient_clip_val: float | None,
    gradient_clip_algorithm: str | None,
    truncated_bptt_steps: int | None,
    track_grad_norm: float | str,
    terminate_on_nan: bool,
    detect_anomaly: bool,
    precision: int | str,
    float32_matmul_precision: MatmulPrecisionName | None,
    channels_last: bool,
    compile: bool | dict[str, Any],
    half_precision: PrecisionName = "16-mixed",
) -> Optimization:
    """Parse the settings of the optimizer step; as in Lightning, a clip value of 0 means no clipping.

    `half_precision` is what `precision=16` stands for on the accelerator.
    """
    if gradient_clip_val is not None and not gradient_clip_val >= 0:
        raise ConfigError(f"gradient_clip_val={gradient_clip_val}: must be 0 (no clipping) or more")
    algorithm: Literal["norm", "value"] = "value" if gradient_clip_algorithm == "value" else "norm"
    if gradient_clip_algorithm not in (None, "norm", "value"):
        raise ConfigError(f"gradient_clip_algorithm={gradient_clip_algorithm!r}: must be 'norm' or 'value'")
    if truncated_bptt_steps is not None:
        check_count(1, truncated_bptt_steps=truncated_bptt_steps)
    check_switch(terminate_on_nan=terminate_on_nan, detect_anomaly=detect_anomaly, channels_last=channels_last)
    if float32_matmul_precision not in (None, *get_args(MatmulPrecisionName)):
        raise ConfigError(
            f"float32_matmul_precision={float32_matmul_precision!r}: must be 'highest', 'high' (TF32), 'medium' "
            "(bfloat16) or None (as this process has it)"
        )
    return Optimization(
        accumulation=_parse_accumulation(accumulate_grad_batches),
        clip_val=gradient_clip_val or None,
        clip_algorithm=algorithm,
        precision=half_precision if str(precision) == "16" else _parse_precision(precision),
        truncated_steps=truncated_bptt_steps,
        grad_norm_order=_parse_norm_order(track_grad_norm),
        is_ending_on_nan=terminate_on_nan,
        is_detecting_anomaly=detect_anomaly,
        matmul_precision=float32_matmul_precision,
        is_channels_last=channels_last,
        compile_options=_parse_compile_options(compile),
    )


def _parse_accumulation(given: int | dict[int, int]) -> tuple[tuple[int, int], ...]:
    if not isinstance(given, dict):
        check_count(1, accumulate_grad_batches=given)
        return ((0, given),)
    for epoch, window in given.items():
        is_right = all(isinstance(number, int) and not isinstance(number, bool) for number in (epoch, window))
        if not is_right or epoch < 0 or window < 1:
            raise ConfigError(
                f"accumulate_grad_batches={given!r}: must be an int, or a dict of the batches in a window by the epoch "
                "from which on it is so: {0: 1, 4: 8}"
            )
    return tuple(sorted({0: 1, **given}.items()))


def _parse_norm_order(given: float | str) -> float | None:
    if given in (-1, "-1"):
        return None
    try:
        order = float(given)
    except (TypeError, ValueError):
        order = math.nan
    if isinstance(given, bool) or not order > 0:
        raise ConfigError(f"track_grad_norm={given!r}: must be the norm's order, 2 or 'inf' for example, or -1 (off)")
    return order


def _parse_compile_options(given: bool | dict[str, Any]) -> dict[str, Any] | None:
    if isinstance(given, bool):
        return {} if given else None
    if not isinstance(given, dict):
        raise ConfigError(f"compile={given!r}: must be True, False or a dict of torch.compile's keywords")
    unknown = [str(name) for name in given if name not in _COMPILE_OPTIONS]
    if unknown:
        raise ConfigError(
            f"compile={given!r}: torch.compile has no {', '.join(unknown)}; it takes {', '.join(_COMPILE_OPTIONS)}"
        )
    if given.get("mode") is not None and given.get("options") is not None:
        raise ConfigError(f"compile={given!r}: torch.compile takes a mode or options, not both")
    return dict(given)


def _parse_precision(given: int | str) -> PrecisionName:
    if str(given) not in _PRECISIONS:
        raise ConfigError(f"precision={given!r}: must be one of {', '.join(_PRECISIONS)}")
    return _PRECISIONS[str(given)]


def build_plan(
    *,
    workers: Workers,
    strategy: StrategyOptions,
    limits: Limits,
    validation: Validation,
    optimization: Optimization,
    log_every_n_steps: int,
    default_root_dir: str | os.PathLike[str] | None,
    sync_batchnorm: bool,
    use_distributed_sampler: bool,
    prepare_data_per_node: bool,
    reload_dataloaders_every_n_epochs: int,
    multiple_trainloader_mode: CombinationName,
    deterministic: bool | Literal["warn"],
    benchmark: bool | None,
    inference_mode: bool,
    checkpoint_async: bool,
    fast_dev_run: bool | int,
) -> Plan:
    """Check the arguments that belong to no group and build the Plan; the first five are parsed groups.

    Raises:
        ConfigError: If a value cannot work.
    """
    check_count(
        0,
        log_every_n_steps=log_every_n_steps,
        reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
    )
    check_switch(
        sync_batchnorm=sync_batchnorm,
        use_distributed_sampler=use_distributed_sampler,
        prepare_data_per_node=prepare_data_per_node,
        inference_mode=inference_mode,
        checkpoint_async=checkpoint_async,
        benchmark=False if benchmark is None else benchmark,
        deterministic=deterministic if deterministic != "warn" else True,
    )
    if multiple_trainloader_mode not in get_args(CombinationName):
        modes = ", ".join(map(repr, get_args(CombinationName)))
        raise ConfigError(f"multiple_trainloader_mode={multiple_trainloader_mode!r}: must be one of {modes}")
    workers.accelerator.check_settings(
        precision=optimization.precision,
        num_workers=workers.num_workers,
        is_compiling=optimization.compile_options is not None,
        is_syncing_batchnorm=sync_batchnorm,
    )
    return Plan(
        workers=workers,
        strategy=strategy,
        limits=limits,
        validation=validation,
        optimization=optimization,
        reporting=Reporting(log_every_n_steps=log_every_n_steps),
        default_root_dir=os.fspath(default_root_dir or os.getcwd()),
        is_syncing_batchnorm=sync_batchnorm,
        use_distributed_sampler=use_distributed_sampler,
        reload_loaders_every_n_epochs=reload_dataloaders_every_n_epochs,
        combination=multiple_trainloader_mode,
        prepares_per_node=prepare_data_per_node,
        deterministic=deterministic,
        benchmark=benchmark,
        inference_mode=inference_mode,
        is_saving_async=checkpoint_async,
        is_dev_run=bool(fast_dev_run),
    )


SizeMode = Literal["power", "binsearch", "throughput"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Searches:
    """The searches to run before a fit."""

    rate_name: str | None = None
    """Attribute for the learning rate; empty: `lr` or `learning_rate`; None: no search for a rate."""
    size_mode: SizeMode | None = None
    """None: no search for a batch size."""


def parse_searches(
    *, auto_lr_find: bool | str, auto_scale_batch_size: bool | str, fast_dev_run: bool | int
) -> Searches:
    """Parse the two searches; a fast_dev_run has none."""
    if not isinstance(auto_lr_find, (bool, str)) or auto_lr_find == "":
        raise ConfigError(f"auto_lr_find={auto_lr_find!r}: must be True, False or the name of the module's attribute")
    modes: dict[Any, SizeMode | None] = {False: None, True: "power", **{mode: mode for mode in get_args(SizeMode)}}
    if not isinstance(auto_scale_batch_size, (bool, str)) or auto_scale_batch_size not in modes:
        raise ConfigError(
            f"auto_scale_batch_size={auto_scale_batch_size!r}: must be True or 'power' (doubling), 'binsearch', "
            "'throughput' (the fastest) or False"
        )
    if fast_dev_run:
        return Searches()
    names = {False: None, True: ""}
    return Searches(
        rate_name=names[auto_lr_find] if isinstance(auto_lr_find, bool) else auto_lr_find,
        size_mode=modes[auto_scale_batch_size],
    )


def check_count(least: int, **named: Any) -> None:
    """Raise ConfigError for the first argument that is not an int of at least `least`."""
    for name, value in named.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r}: must be an int of at least {least}")


def check_switch(**named: Any) -> None:
    """Raise ConfigError for the first argument that is neither True nor False."""
    for name, value in named.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name}={value!r}: must be True or False")


def check_share(**named: Any) -> None:
    """Raise ConfigError for the first argument that is neither a fraction (float) nor a count (int) of batches."""
    for name, value in named.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not value >= 0 or (isinstance(value, float) and value > 1):
            raise ConfigError(
                f"{name}={value!r}: must be a float in [0, 1] (a fraction: 1.0 is all) or an int (a count of batches: "
                "1 is one)"
            )
