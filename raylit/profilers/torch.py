"""PyTorchProfiler: torch.profiler's operators and its trace for TensorBoard or Perfetto. Both sides."""

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from torch.utils.hooks import RemovableHandle

from raylit.profilers.base import NEXT_BATCH, Profiler


class PyTorchProfiler(Profiler):
    """Operators with their times on CPU and GPU, of a few batches, and a trace of them in which the actions stand.

    `profiler_kwargs` go to `torch.profiler.profile`: `schedule`, in batches (by default one is waited for, one warms
    up, three are recorded), `activities`, `with_stack`, `profile_memory`, ... `row_limit`, `sort_by_key` and
    `table_kwargs` are for the table, `group_by_input_shapes` splits its rows. `record_module_names`: the trace has each
    submodule's forward by its name. The trace's file, in `dirpath` or else in the log directory, ends in
    `.pt.trace.json`. For the rest see Profiler.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        group_by_input_shapes: bool = False,
        export_to_chrome: bool = True,
        row_limit: int = 20,
        sort_by_key: str | None = None,
        record_module_names: bool = True,
        table_kwargs: dict[str, Any] | None = None,
        **profiler_kwargs: Any,
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self._is_grouping = group_by_input_shapes
        self._is_exporting = export_to_chrome
        self._is_naming = record_module_names
        self._table = {"sort_by": sort_by_key, "row_limit": row_limit, **(table_kwargs or {})}
        self._kwargs = profiler_kwargs
        self._stage = "fit"
        self._profile: profile | None = None
        self._ranges: list[tuple[str, record_function]] = []
        self._text = ""
        self._traces: list[bytes] = []

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        super().setup(stage, local_rank, log_dir)
        self._stage, self._text, self._traces, self._ranges = stage, "", [], []
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        given = {
            "activities": activities,
            "schedule": schedule(wait=1, warmup=1, active=3, repeat=1),
            "record_shapes": self._is_grouping,
            **self._kwargs,
        }
        self._on_trace_ready: Callable[[profile], Any] | None = given.pop("on_trace_ready", None)
        self._profile = profile(**given, on_trace_ready=self._keep)
        self._profile.start()

    def attach(self, module: nn.Module) -> Sequence[RemovableHandle]:
        """Each submodule's forward has its name in the trace."""
        attached: list[RemovableHandle] = []
        for name, child in module.named_modules() if self._is_naming else ():
            if name:
                title = f"{type(child).__name__}: {name}"
                attached.append(child.register_forward_pre_hook(_ignoring_arguments(self._enter, title)))
                leave = _ignoring_arguments(self._leave, title)
                attached.append(child.register_forward_hook(leave, always_call=True))
        return attached

    def start(self, action_name: str) -> None:
        super().start(action_name)
        if self._profile is not None and action_name == NEXT_BATCH[self._stage]:
            self._step()
        self._enter(action_name)

    def stop(self, action_name: str) -> None:
        self._leave(action_name)
        super().stop(action_name)

    def summary(self) -> str:
        self._end()
        return self._text or "The run had too few batches for the profiler's schedule: nothing was recorded."

    def files(self) -> Mapping[str, bytes]:
        if len(self._traces) == 1:
            return {".pt.trace.json": self._traces[0]}
        return {f"-{index}.pt.trace.json": trace for index, trace in enumerate(self._traces)}

    def teardown(self, stage: str | None = None) -> None:
        self._end()
        self._traces = []
        super().teardown(stage)

    def _step(self) -> None:
        # Out of hand meanwhile: where this raises, torch must not be asked to stop, which would crash the process.
        stepped, self._profile = self._profile, None
        assert stepped is not None
        with warnings.catch_warnings():
            # A new cycle of the schedule forgets the one before, which has been kept here.
            warnings.filterwarnings("ignore", message=".*Profiler clears events")
            stepped.step()
        self._profile = stepped

    def _enter(self, name: str) -> None:
        entered = record_function(name)
        entered.__enter__()
        self._ranges.append((name, entered))

    def _leave(self, name: str) -> None:
        for position in reversed(range(len(self._ranges))):
            if self._ranges[position][0] == name:
                self._ranges.pop(position)[1].__exit__(None, None, None)
                return

    def _end(self) -> None:
        ended, self._profile = self._profile, None
        while self._ranges:
            self._ranges.pop()[1].__exit__(None, None, None)
        if ended is not None:
            ended.stop()

    def _keep(self, recorded: profile) -> None:
        """A cycle of the schedule is over."""
        order = "self_device_time_total" if torch.cuda.is_available() else "cpu_time_total"
        table = {**self._table, "sort_by": self._table["sort_by"] or order}
        self._text = recorded.key_averages(group_by_input_shape=self._is_grouping).table(**table)
        if self._is_exporting:
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "trace.json"
                recorded.export_chrome_trace(str(path))
                self._traces.append(path.read_bytes())
        if self._on_trace_ready is not None:
            self._on_trace_ready(recorded)


def _ignoring_arguments(call: Callable[[str], None], title: str) -> Callable[..., None]:
    return lambda *_: call(title)
