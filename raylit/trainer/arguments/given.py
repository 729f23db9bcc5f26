"""Arguments as they were given: collected, checked, and sorted into the groups of the Plan."""

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

from raylit.config.plan import CombinationName, Plan, Reporting
from raylit.errors import ConfigError
from raylit.trainer.arguments.checks import check_count, check_switch
from raylit.trainer.arguments.training import parse_limits, parse_optimization, parse_strategy, parse_validation
from raylit.trainer.arguments.workers import parse_workers

_Result = TypeVar("_Result")


class Given:
    """Arguments under today's names, each with a value."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments

    def to(self, parser: Callable[..., _Result], **more: Any) -> _Result:
        """What a parser makes of those arguments that its signature names; `more` it gets beside them."""
        named = [p.name for p in inspect.signature(parser).parameters.values() if p.kind is p.KEYWORD_ONLY]
        return parser(**{name: self._arguments[name] for name in named if name not in more}, **more)

    def plan(self) -> Plan:
        """ConfigError: a value, or a combination, that cannot work."""
        workers = self.to(parse_workers)
        return self.to(
            _assembled,
            workers=workers,
            strategy=self.to(parse_strategy, workers=workers),
            limits=self.to(parse_limits),
            validation=self.to(parse_validation),
            optimization=self.to(parse_optimization),
        )


def _assembled(
    *,
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
    **parsed: Any,
) -> Plan:
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
        benchmark=bool(benchmark) if benchmark is None else benchmark,
        deterministic=deterministic if deterministic != "warn" else True,
    )
    if multiple_trainloader_mode not in get_args(CombinationName):
        modes = ", ".join(map(repr, get_args(CombinationName)))
        raise ConfigError(f"multiple_trainloader_mode={multiple_trainloader_mode!r}: must be one of {modes}")
    return Plan(
        **parsed,
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
