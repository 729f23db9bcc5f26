"""Profilers: the interface, the table of results, and SimpleProfiler, which adds up the time of each action."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from raylit.profilers.stopwatch import Stopwatch
from raylit.protocol.messages import Action, Profile
from raylit.storage import check_stays_below
from raylit.text_table import draw_table, fitting_widths, printable

_GAP = "   "


def draw_profiles(stage: str, profiles: Sequence[Profile], *, is_extended: bool = True) -> str:
    """A table for each profile, beside each other where the terminal has room for that."""
    shown = [profile for profile in profiles if profile.actions]
    if not shown:
        return ""
    workers = [profile for profile in shown if profile.rank is not None]
    order = list(dict.fromkeys(action.name for profile in workers for action in _longest_first(profile)))
    blocks = [_block(profile, order, is_extended=is_extended) for profile in shown]
    lines = [f"Profile of {stage}, host time"]
    for row in _abreast(blocks, shutil.get_terminal_size().columns):
        lines += ["", *(_GAP.join(parts).rstrip() for parts in zip(*_levelled(row), strict=True))]
    return "\n".join(lines)


def _longest_first(profile: Profile) -> list[Action]:
    return sorted(profile.actions, key=lambda action: action.total_s, reverse=True)


def _block(profile: Profile, order: Sequence[str], *, is_extended: bool) -> list[str]:
    """A profile's title, table and peak memory. Workers' tables have one order of rows, for the eye to compare."""
    actions = {action.name: action for action in _longest_first(profile)}
    names = list(actions) if profile.rank is None else order
    header = ["Action", "Total s", "Mean ms", *(["Calls", "Share"] if is_extended else [])]
    total = Action(name="total", num_calls=1, total_s=profile.elapsed_s)
    measured = [actions.get(name, Action(name=name, num_calls=0, total_s=0.0)) for name in names]
    rows = [_row(action, profile.elapsed_s, is_extended=is_extended) for action in [*measured, total]]
    rows[-1][2:4] = ["", ""][: len(rows[-1]) - 2]
    memory = ", ".join(f"{_size(size)} {of}" for of, size in profile.peak_memory_bytes)
    table = draw_table(header, rows, fitting_widths(header, rows), align="l" + "r" * (len(header) - 1))
    return [profile.title, *table, *([f"Peak memory: {memory}"] if memory else [])]


def _row(action: Action, elapsed_s: float, *, is_extended: bool) -> list[str]:
    mean_ms = f"{1000 * action.total_s / action.num_calls:,.3f}" if action.num_calls else ""
    row = [action.name, f"{action.total_s:,.3f}", mean_ms]
    if is_extended:
        row += [f"{action.num_calls:,}" if action.num_calls else "", f"{action.total_s / max(elapsed_s, 1e-9):.1%}"]
    return row


def _abreast(blocks: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """Rows of as many blocks as fit."""
    rows: list[list[list[str]]] = []
    taken = 0
    for block in blocks:
        block_width = max(map(len, block))
        if rows and taken + len(_GAP) + block_width <= width:
            rows[-1].append(block)
            taken += len(_GAP) + block_width
        else:
            rows.append([block])
            taken = block_width
    return rows


def _levelled(row: Sequence[list[str]]) -> list[list[str]]:
    """Blocks with one number of lines, each line as wide as its block."""
    height = max(map(len, row))
    return [[line.ljust(max(map(len, block))) for line in [*block, *[""] * (height - len(block))]] for block in row]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


NEXT_BATCH = {
    "fit": "train_dataloader_next",
    "validate": "val_dataloader_next",
    "test": "test_dataloader_next",
    "predict": "predict_dataloader_next",
}
"""The action of waiting for a loader, by what the loop is for."""

_Result = TypeVar("_Result")


class Profiler:
    """Every worker has its own copy; the slowest and the fastest rank's findings come back to the driver's object.

    `dirpath` and `filename`: the table goes into `dirpath/STAGE-filename.txt` instead of to stdout, by default in the
    run's log directory. A profiler of one's own overrides `start`, `stop` and `summary`; where its `start` and `stop`
    call these ones it keeps the table of times.

    Times are those of the host. On CUDA kernels are only launched in most actions: what they cost shows where the host
    next waits for the device, such as in `.item()`. The PyTorch profiler knows the kernels' own times.
    """

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None) -> None:
        check_stays_below(filename or "", f"{type(self).__name__}(filename={filename!r})")
        self.dirpath = None if dirpath is None else os.fspath(dirpath)
        self.filename = filename
        self.profiles: tuple[Profile, ...] = ()
        """In the driver, after a run: the slowest rank's, the fastest's (unless it is the same) and the driver's."""
        self._stopwatch: Stopwatch | None = None

    # In the workers

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """A stage begins."""
        self._stopwatch = Stopwatch()

    def attach(self, module: nn.Module) -> Sequence[RemovableHandle]:
        """The module on its device, before its first step; what is hooked onto it is removed at the stage's end."""
        return ()

    def start(self, action_name: str) -> None:
        if self._stopwatch is not None:
            self._stopwatch.start(action_name)

    def stop(self, action_name: str) -> None:
        """ValueError: the action has not been started."""
        if self._stopwatch is not None:
            self._stopwatch.stop(action_name)

    @contextmanager
    def profile(self, action_name: str) -> Iterator[None]:
        """Measure what is inside, in any hook: `with self.trainer.profiler.profile("my part"):`."""
        self.start(action_name)
        try:
            yield
        finally:
            self.stop(action_name)

    @property
    def actions(self) -> tuple[Action, ...]:
        """What this rank has taken its time for so far."""
        return () if self._stopwatch is None else self._stopwatch.actions()

    @property
    def elapsed_s(self) -> float:
        """Since the stage began."""
        return 0.0 if self._stopwatch is None else self._stopwatch.elapsed_s

    def summary(self) -> str:
        """This rank's findings beyond the table of times, as text; called at the end of the stage."""
        return ""

    def files(self) -> Mapping[str, bytes]:
        """This rank's findings that are files, by the ends of their names; called after `summary`."""
        return {}

    def teardown(self, stage: str | None = None) -> None:
        """The stage is over, well or not. May be called more than once."""
        self._stopwatch = None

    # In the driver

    def describe(self, stage: str, profiles: Sequence[Profile], *, log_dir: str) -> None:
        """Show a run's profiles, or write them to the file that was asked for."""
        self.profiles = tuple(profiles)
        text = "\n\n".join(filter(None, [draw_profiles(stage, profiles, **self.columns), *map(_titled, profiles)]))
        stem = f"{self.dirpath or log_dir}/{stage}-{self.filename or 'profile'}"
        files = {
            f"{stem}-rank{profile.rank}{suffix}": content
            for profile in profiles
            for suffix, content in profile.files.items()
        }
        if self.dirpath is None and self.filename is None:
            print(printable("\n".join([text, *(f"\nWritten to {path}" for path in files)])))
        else:
            files[f"{stem}.txt"] = f"{text}\n".encode()
        for path, content in files.items():
            _write(path, content)

    @property
    def columns(self) -> Mapping[str, bool]:
        """How the table of times is drawn."""
        return {}


class PassThroughProfiler(Profiler):
    """Measures nothing; what `trainer.profiler` is without another."""


def time_items(profiler: Profiler, name: str, call: Callable[..., _Result]) -> Callable[..., _Result]:
    """`call`, measured as an action of this name."""

    @wraps(call)
    def measured(*args: Any, **kwargs: Any) -> _Result:
        profiler.start(name)
        try:
            return call(*args, **kwargs)
        finally:
            profiler.stop(name)

    return measured


def _write(path: str, content: bytes) -> None:
    if "://" in path:
        import fsspec  # with the first URL only

        with fsspec.open(path, "wb", auto_mkdir=True) as remote:
            remote.write(content)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def _titled(profile: Profile) -> str:
    return f"Rank {profile.rank}\n{profile.text}" if profile.text else ""


class SimpleProfiler(Profiler):
    """How often each action ran, how long in all and on average, and its share of the run; times exclude the actions
    inside an action, so that they add up. `extended=False`: totals and means only. For the rest see Profiler."""

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        extended: bool = True,
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self.extended = extended

    @property
    def columns(self) -> Mapping[str, bool]:
        return {"is_extended": self.extended}
