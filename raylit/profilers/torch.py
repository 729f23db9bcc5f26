"""PyTorchProfiler: torch.profiler's operators and a trace for TensorBoard or Perfetto. Driver and workers."""

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule, supported_activities
from torch.utils.hooks import RemovableHandle

from raylit.profilers.base import NEXT_BATCH, Profiler


class PyTorchProfiler(Profiler):
    """Profiler of operators on CPU and GPU in a few batches, with a trace that contains the actions.

    The trace's file, in `dirpath` or else in the log directory, ends in `.pt.trace.json`. See Profiler for what all
    profilers share.

    Args:
        dirpath: Directory of the output; None: the run's log directory.
        filename: End of the output's file name; without both the table is printed.
        group_by_input_shapes: Split the table's rows by input shapes.
        export_to_chrome: Write the trace.
        row_limit: Number of rows in the table.
        sort_by_key: Column to sort by; None: own device time with a GPU, else CPU time.
        record_module_names: Record each submodule's forward under its name.
        table_kwargs: Passed to torch's `table`.
        **profiler_kwargs: Passed to `torch.profiler.profile`: `schedule` in batches (by default 1 to wait, 1 to warm
            up, 3 to record), `activities`, `with_stack`, `profile_memory`, ...
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
        arguments = {
            "activities": supported_activities(),
            "schedule": schedule(wait=1, warmup=1, active=3, repeat=1),
            "record_shapes": self._is_grouping,
            **self._kwargs,
        }
        self._on_trace_ready: Callable[[profile], Any] | None = arguments.pop("on_trace_ready", None)
        self._profile = profile(**arguments, on_trace_ready=self._record_cycle)
        self._profile.start()

    def attach(self, module: nn.Module) -> Sequence[RemovableHandle]:
        """Record each submodule's forward under its name in the trace."""
        handles: list[RemovableHandle] = []
        for name, child in module.named_modules() if self._is_naming else ():
            if name:
                title = f"{type(child).__name__}: {name}"
                handles.append(child.register_forward_pre_hook(_ignore_arguments(self._enter, title)))
                leave = _ignore_arguments(self._leave, title)
                handles.append(child.register_forward_hook(leave, always_call=True))
        return handles

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
        # Unset during the step: if it raises, torch must not be asked to stop, which would crash the process.
        profiler, self._profile = self._profile, None
        assert profiler is not None
        with warnings.catch_warnings():
            # A new cycle of the schedule discards the previous one, which `_record_cycle` has recorded.
            warnings.filterwarnings("ignore", message=".*Profiler clears events")
            profiler.step()
        self._profile = profiler

    def _enter(self, name: str) -> None:
        recording = record_function(name)
        recording.__enter__()
        self._ranges.append((name, recording))

    def _leave(self, name: str) -> None:
        for position in reversed(range(len(self._ranges))):
            if self._ranges[position][0] == name:
                self._ranges.pop(position)[1].__exit__(None, None, None)
                return

    def _end(self) -> None:
        profiler, self._profile = self._profile, None
        while self._ranges:
            self._ranges.pop()[1].__exit__(None, None, None)
        if profiler is not None:
            profiler.stop()

    def _record_cycle(self, profiler: profile) -> None:
        """Store table and trace at the end of a cycle of the schedule."""
        order = "cpu_time_total" if supported_activities() == {ProfilerActivity.CPU} else "self_device_time_total"
        table = {**self._table, "sort_by": self._table["sort_by"] or order}
        self._text = profiler.key_averages(group_by_input_shape=self._is_grouping).table(**table)
        if self._is_exporting:
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory) / "trace.json"
                profiler.export_chrome_trace(str(path))
                self._traces.append(path.read_bytes())
        if self._on_trace_ready is not None:
            self._on_trace_ready(profiler)


def _ignore_arguments(call: Callable[[str], None], title: str) -> Callable[..., None]:
    return lambda *_: call(title)
