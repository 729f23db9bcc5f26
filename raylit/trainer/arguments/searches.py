"""What is to be searched for before a fit. Driver."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from raylit.errors import ConfigError

SizeMode = Literal["power", "binsearch", "throughput"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Searches:
    """Names that are None: not searched for."""

    rate_name: str | None = None
    """Of the attribute for the learning rate; empty: the usual one."""
    size_mode: SizeMode | None = None


def parse_searches(
    *, auto_lr_find: bool | str, auto_scale_batch_size: bool | str, fast_dev_run: bool | int
) -> Searches:
    """None in a run of a few batches."""
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
