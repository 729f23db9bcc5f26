"""File names of checkpoints: patterns that metrics fill in. Driver only."""

import os
import re
from collections.abc import Mapping
from typing import Any

from raylit.errors import ConfigError
from raylit.state import RunState

_FIELD = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}")


def fill(pattern: str, metrics: Mapping[str, Any], *, equals: str | None) -> str:
    """The pattern with each `{name}` or `{name:spec}` filled in, 0 where there is no such metric.

    With `equals` ("=") the metric's name comes first: `{epoch:02}` becomes `epoch=07`. ConfigError: an unfit spec.
    """

    def filled(match: re.Match[str]) -> str:
        name, spec = match[1], match[2] or ""
        try:
            value = format(metrics.get(name, 0), spec)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the checkpoint's file name {pattern!r}: {match[0]} does not fit: {error}") from error
        return value if equals is None else f"{name}{equals}{value}"

    return _FIELD.sub(filled, pattern)


def fields(state: RunState) -> dict[str, float]:
    """What a file name or `monitor` may refer to; a logged `epoch` or `step` wins over the run's."""
    metrics = dict(state.callback_metrics)
    metrics["epoch"] = int(metrics.get("epoch", state.progress.epoch))
    metrics["step"] = int(metrics.get("step", state.progress.global_step))
    return metrics


def absolute(path: str) -> str:
    """Where every process finds it, whatever directory is its current one; a URL as it is."""
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))
