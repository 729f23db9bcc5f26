"""Attribute: where the user's objects keep the value that a search is to set. Driver."""

from collections.abc import Sequence
from typing import Any

from raylit.errors import ConfigError
from raylit.worker.context import Job

RATE_NAMES = ("lr", "learning_rate")
SIZE_NAMES = ("batch_size",)


def owners_of(job: Job) -> list[Any]:
    """What may have it."""
    return [owner for owner in (job.module, job.datamodule) if owner is not None]


def find(names: Sequence[str], job: Job, *, argument: str) -> str:
    """The first name that module or data module has, as an attribute or in its `hparams`; "hparams.lr" is read as "lr".

    ConfigError names the numbers that there are.
    """
    owners = owners_of(job)
    for name in (name.removeprefix("hparams.") for name in names):
        if any(_places(name, owner) for owner in owners):
            return name
    wanted = " or ".join(map(repr, names))
    there = sorted({f"{type(owner).__name__}.{name}" for owner in owners for name in _numbers(owner)})
    raise ConfigError(
        f"{argument}: there is no attribute or hyper-parameter {wanted} to set; numbers that there are: "
        f"{', '.join(there) or 'none'}. Add self.{names[0]} = ... and use it, or give another name"
    )


def get(name: str, job: Job) -> Any:
    return next(place[name] for owner in owners_of(job) for place in _places(name, owner))


def put(name: str, value: Any, job: Job) -> None:
    """In every place that has it, so that whichever is read has the value."""
    for owner in owners_of(job):
        for place in _places(name, owner):
            place[name] = value


def _places(name: str, owner: Any) -> list[Any]:
    """The dictionaries of the owner that hold it; `hparams` are one."""
    own, hparams = vars(owner), owner.find_hparams()
    return [place for place in (own, hparams) if place is not None and name in place]


def _numbers(owner: Any) -> list[str]:
    held = {**vars(owner), **(owner.find_hparams() or {})}
    return [
        name
        for name, value in held.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not name.startswith("_")
    ]
