"""Profiler, the base of all profilers, SimpleProfiler, the table of results, and what measures. Driver and workers."""

import contextlib
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle

from raylit.accelerators import Accelerator
from raylit.protocol.messages import Action, Profile
from raylit.storage import check_stays_below
from raylit.text_table import draw_table, fitting_widths, printable

_GAP = "   "

NEXT_BATCH = {
    "fit": "train_dataloader_next",
    "validate": "val_dataloader_next",
    "test": "test_dataloader_next",
    "predict": "predict_dataloader_next",
}
"""The name of the action of waiting for a loader, by stage."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_END = object()


class Profiler:
    """Base of all profilers. Every worker has its own copy; the slowest and the fastest rank send their findings.

    The findings go to the driver's object. Override `start`, `stop` and `summary` for a profiler of your own; if its
    `start` and `stop` call these, it keeps the table of times.

    Times are host times. On CUDA most actions only launch kernels: the kernels' time shows where the host next waits
    for the device, such as in `.item()`. PyTorchProfiler measures the kernels' own times.

    Args:
        dirpath: Directory for `STAGE-filename.txt`; None: the run's log directory.
        filename: End of the file name; without both arguments the table is printed to stdout.

    Raises:
        ConfigError: if the name leads out of the directory.
    """

    def __init__(self, dirpath: str | os.PathLike[str] | None = None, filename: str | None = None) -> None:
        check_stays_below(filename or "", f"{type(self).__name__}(filename={filename!r})")
        self.dirpath = None if dirpath is None else os.fspath(dirpath)
        self.filename = filename
        self.profiles: tuple[Profile, ...] = ()
        """In the driver, after a run: profiles of the slowest rank, the fastest (unless the same) and the driver."""
        self._stopwatch: Stopwatch | None = None

    # In the workers

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Begin a stage."""
        self._stopwatch = Stopwatch()

    def attach(self, module: nn.Module) -> Sequence[RemovableHandle]:
        """Attach hooks to the module, which is on its device and before its first step.

        The returned handles are removed at the end of the stage.
        """
        return ()

    def start(self, action_name: str) -> None:
        """Begin an action."""
        if self._stopwatch is not None:
            self._stopwatch.start(action_name)

    def stop(self, action_name: str) -> None:
        """End an action.

        Raises:
            ValueError: if it has not been started.
        """
        if self._stopwatch is not None:
            self._stopwatch.stop(action_name)

    @contextmanager
    def profile(self, action_name: str) -> Iterator[None]:
        """Measure the block, in any hook: `with self.trainer.profiler.profile("my part"):`."""
        self.start(action_name)
        try:
            yield
        finally:
            self.stop(action_name)

    @property
    def actions(self) -> tuple[Action, ...]:
        """This rank's measurements so far."""
        return () if self._stopwatch is None else self._stopwatch.actions()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stage began."""
        return 0.0 if self._stopwatch is None else self._stopwatch.elapsed_s

    def summary(self) -> str:
        """Return this rank's further findings as text; called at the end of the stage."""
        return ""

    def files(self) -> Mapping[str, bytes]:
        """Return contents of files to write for this rank, by the ends of their names; called after `summary`."""
        return {}

    def teardown(self, stage: str | None = None) -> None:
        """End the stage, successful or not. May be called more than once."""
        self._stopwatch = None

    # In the driver

    def describe(self, stage: str, profiles: Sequence[Profile], *, log_dir: str) -> None:
        """Print a run's profiles, or write them to the configured file."""
        self.profiles = tuple(profiles)
        text = "\n\n".join(filter(None, [draw_profiles(stage, profiles, **self.columns), *map(_add_title, profiles)]))
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
            _write_file(path, content)

    @property
    def columns(self) -> Mapping[str, bool]:
        """Options for `draw_profiles`."""
        return {}


class PassThroughProfiler(Profiler):
    """Profiler that measures nothing; the value of `trainer.profiler` by default."""


class SimpleProfiler(Profiler):
    """Profiler that counts each action and measures its total and mean time and its share of the run.

    Times exclude the actions inside an action, so that they add up. See Profiler for what all profilers share.

    Args:
        dirpath: Directory of the output; None: the run's log directory.
        filename: End of the output's file name; without both the table is printed.
        extended: Also show counts and shares.
    """

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


def draw_profiles(stage: str, profiles: Sequence[Profile], *, is_extended: bool = True) -> str:
    """Draw a table for each profile, side by side if the terminal is wide enough."""
    nonempty = [profile for profile in profiles if profile.actions]
    if not nonempty:
        return ""
    workers = [profile for profile in nonempty if profile.rank is not None]
    order = list(dict.fromkeys(action.name for profile in workers for action in _sort_actions(profile)))
    blocks = [_build_block(profile, order, is_extended=is_extended) for profile in nonempty]
    lines = [f"Profile of {stage}, host time"]
    for row in _arrange_blocks(blocks, shutil.get_terminal_size().columns):
        lines += ["", *(_GAP.join(parts).rstrip() for parts in zip(*_pad_blocks(row), strict=True))]
    return "\n".join(lines)


def time_items(profiler: Profiler, name: str, call: Callable[..., _Result]) -> Callable[..., _Result]:
    """Return `call`, measured as an action of this name."""

    @wraps(call)
    def call_and_measure(*args: Any, **kwargs: Any) -> _Result:
        profiler.start(name)
        try:
            return call(*args, **kwargs)
        finally:
            profiler.stop(name)

    return call_and_measure


def _sort_actions(profile: Profile) -> list[Action]:
    return sorted(profile.actions, key=lambda action: action.total_s, reverse=True)


def _build_block(profile: Profile, order: Sequence[str], *, is_extended: bool) -> list[str]:
    """Return the lines of a profile: title, table and peak memory. Workers' tables have the same order of rows."""
    actions = {action.name: action for action in _sort_actions(profile)}
    names = list(actions) if profile.rank is None else order
    header = ["Action", "Total s", "Mean ms", *(["Calls", "Share"] if is_extended else [])]
    total = Action(name="total", num_calls=1, total_s=profile.elapsed_s)
    measured = [actions.get(name, Action(name=name, num_calls=0, total_s=0.0)) for name in names]
    rows = [_build_row(action, profile.elapsed_s, is_extended=is_extended) for action in [*measured, total]]
    rows[-1][2:4] = ["", ""][: len(rows[-1]) - 2]
    memory = ", ".join(f"{_format_size(size)} {kind}" for kind, size in profile.peak_memory_bytes)
    table = draw_table(header, rows, fitting_widths(header, rows), align="l" + "r" * (len(header) - 1))
    return [profile.title, *table, *([f"Peak memory: {memory}"] if memory else [])]


def _build_row(action: Action, elapsed_s: float, *, is_extended: bool) -> list[str]:
    mean_ms = f"{1000 * action.total_s / action.num_calls:,.3f}" if action.num_calls else ""
    row = [action.name, f"{action.total_s:,.3f}", mean_ms]
    if is_extended:
        row += [f"{action.num_calls:,}" if action.num_calls else "", f"{action.total_s / max(elapsed_s, 1e-9):.1%}"]
    return row


def _arrange_blocks(blocks: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """Return rows of as many blocks as fit into the width."""
    rows: list[list[list[str]]] = []
    used_width = 0
    for block in blocks:
        block_width = max(map(len, block))
        if rows and used_width + len(_GAP) + block_width <= width:
            rows[-1].append(block)
            used_width += len(_GAP) + block_width
        else:
            rows.append([block])
            used_width = block_width
    return rows


def _pad_blocks(row: Sequence[list[str]]) -> list[list[str]]:
    """Pad the blocks to the same number of lines, and each line to its block's width."""
    height = max(map(len, row))
    return [[line.ljust(max(map(len, block))) for line in [*block, *[""] * (height - len(block))]] for block in row]


def _format_size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def _write_file(path: str, content: bytes) -> None:
    if "://" in path:
        import fsspec  # with the first URL only

        with fsspec.open(path, "wb", auto_mkdir=True) as remote:
            remote.write(content)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def _add_title(profile: Profile) -> str:
    return f"Rank {profile.rank}\n{profile.text}" if profile.text else ""


class Stopwatch:
    """Host time of one thread by action. An action inside another one takes its time from that one."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._totals: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._under_way: list[str] = []
        self._begun_s = self._last_s = clock()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stopwatch was created."""
        return self._clock() - self._begun_s

    def start(self, name: str) -> None:
        """Begin an action."""
        self._account()
        self._under_way.append(name)

    def stop(self, name: str) -> None:
        """End an action and count one call.

        Raises:
            ValueError: if it has not been started.
        """
        if name not in self._under_way:
            raise ValueError(f"Stopping {name!r}, which was never started")
        self._account()
        position = len(self._under_way) - 1 - self._under_way[::-1].index(name)
        del self._under_way[position]
        self._counts[name] = self._counts.get(name, 0) + 1

    def actions(self) -> tuple[Action, ...]:
        """Return the actions in the order in which they first took time, unfinished ones up to now."""
        self._account()
        return tuple(
            Action(name=name, num_calls=self._counts.get(name, 0), total_s=total)
            for name, total in self._totals.items()
        )

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the block as an action."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def time_items(self, name: str, items: Iterator[_Item]) -> Iterator[_Item]:
        """Yield the items, and measure the time of getting each."""
        while True:
            with self.measure(name):
                item = next(items, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def _account(self) -> None:
        now_s = self._clock()
        if self._under_way:
            name = self._under_way[-1]
            self._totals[name] = self._totals.get(name, 0.0) + now_s - self._last_s
        self._last_s = now_s


class PeakMemory:
    """Peak memory of this process, and of the device's allocator. Data loaders' processes are not included."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        accelerator.reset_peak_memory()
        # If the kernel refuses, the peak is that since the process's start.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> tuple[tuple[str, int], ...]:
        """Return names of kinds of memory with their peaks in bytes."""
        peaks = [("resident", _read_peak_resident_bytes())]
        if (num_bytes := self._accelerator.peak_memory_bytes()) is not None:
            peaks.append((f"on {self._accelerator.device()}", num_bytes))
        return tuple(peaks)


def _read_peak_resident_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
