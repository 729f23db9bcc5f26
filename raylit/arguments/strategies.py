"""How the workers share the model: a name of Lightning's, or a strategy object. Driver."""

from raylit.errors import ConfigError
from raylit.plan import Workers
from raylit.strategy_options import DDPStrategy, FSDPStrategy, SingleDeviceStrategy, StrategyOptions

_NAMED: dict[str, StrategyOptions | None] = {
    "auto": None,
    "single": SingleDeviceStrategy(),
    "single_device": SingleDeviceStrategy(),
    "ddp": DDPStrategy(),
    # Lightning's ways to start the processes of "ddp", which Ray starts here.
    **dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_cpu"), DDPStrategy()),
    "fsdp": FSDPStrategy(),
    "fsdp_cpu_offload": FSDPStrategy(cpu_offload=True),
}
"""None: what the number of workers asks for."""
_UNUSED = "_find_unused_parameters_"


def parse_strategy(*, strategy: str | StrategyOptions, workers: Workers) -> StrategyOptions:
    """One worker has nothing to share, whatever strategy is given."""
    chosen = _named(strategy) if isinstance(strategy, str) else strategy
    if chosen is not None and not isinstance(chosen, StrategyOptions):
        raise ConfigError(f"strategy={strategy!r}: must be a name such as 'ddp' or an object such as DDPStrategy(...)")
    if isinstance(chosen, SingleDeviceStrategy) and workers.num_workers > 1:
        raise ConfigError(f"strategy={strategy!r} with {workers.num_workers} workers: use 'ddp' or 'auto'")
    if workers.num_workers <= 1:
        return SingleDeviceStrategy()
    return chosen or DDPStrategy(find_unused_parameters="auto")


def _named(given: str) -> StrategyOptions | None:
    name, has_suffix, is_finding = given.partition(_UNUSED)
    chosen = _NAMED.get(name)
    if name not in _NAMED or (has_suffix and (is_finding not in ("true", "false") or chosen != DDPStrategy())):
        names = ", ".join(map(repr, _NAMED))
        raise ConfigError(
            f"strategy={given!r}: must be one of {names}, of the ddp ones also with '{_UNUSED}true' at its end, or an "
            "object such as DDPStrategy(bucket_cap_mb=50)"
        )
    return DDPStrategy(find_unused_parameters=True) if is_finding == "true" else chosen
