"""What the driver's side of a fit costs with 64, 256 and 1,000 workers, of which only the driver is real.

    python tests/benchmarks/driver_scale.py --num-workers 64 256 1000 --plot tests/benchmarks/driver_scale.svg

The Trainer, the coordinator, the actor group, the heartbeat, the placement group, the object store and every call and
stream between the driver and its workers are the real ones. The workers are stand-ins: a few Ray actors answer the
calls of all ranks and send what two real workers have sent in the same fit just before, rank 0's reports for rank 0 and
rank 1's for every other rank, at the pace of `--interval-s` for each logging interval. They load no model, form no
process group and train nothing. Times are CPU times of the driver's process with all its threads, means over the fit.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import ray
from peers import dataset, module_class
from torch.nn import functional
from torch.utils.data import DataLoader

import raylit as pl
from raylit.driver.ray import local_cluster, worker_pool
from raylit.driver.ray.actor import ActorInfo, Assignment, Outbox
from raylit.driver.ray.actor_group import ActorGroup
from raylit.protocol.messages import (
    ActorMessage,
    Command,
    CommandDone,
    Measured,
    Paused,
    Report,
    Saved,
    Stepped,
    Ticked,
    Train,
)

NUM_HOSTS = 8
"""Processes of stand-ins."""
RANKS_PER_NODE = 8
STEPS_PER_INTERVAL, INTERVALS_PER_EPOCH, NUM_EPOCHS = 10, 6, 3
PAUSE_AFTER = 35
"""Step of each epoch at which a callback of the driver asks for a pause."""
TICK_S = 0.1
EVALUATION_S = 0.2

Recording = dict[str, list[list[list[Report]]]]
"""For each kind of command and each of its runs the reports of ranks 0 and 1."""


@dataclass(frozen=True)
class TimedReport:
    """Report with the time since the command's start at which a stand-in sends it."""

    at_s: float
    report: Report


Script = dict[str, list[list[list[TimedReport]]]]
"""A Recording with times."""


class RecordingGroup(ActorGroup):
    """Group of real workers that keeps their reports."""

    recording: ClassVar[Recording] = defaultdict(list)

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        reports: list[list[Report]] = [[] for _ in range(self.workers.num_workers)]
        self.recording[type(command).__name__].append(reports)
        for rank, report in super().run(command):
            reports[rank].append(report)
            yield rank, report


def build_script(recording: Recording, *, num_workers: int, interval_s: float) -> Script:
    """Give each report its time, and each `Measured` as many ranks as there are workers."""
    script: Script = defaultdict(list)
    for name, runs in recording.items():
        began_at_step = 0
        for reports_of_ranks in runs:
            script[name].append([])
            for rank, reports in enumerate(reports_of_ranks):
                timed: list[TimedReport] = []
                at_s = EVALUATION_S if name == "Evaluate" else 0.0
                for report in reversed(reports):  # a `Measured` goes with the `Stepped` that follows it
                    if isinstance(report, (Stepped, Paused)) and name == "Train":
                        at_s = (report.progress.global_step - began_at_step) / STEPS_PER_INTERVAL * interval_s
                    if isinstance(report, Measured):
                        times = [report.ranks[index % len(report.ranks)] for index in range(num_workers)]
                        report = replace(report, ranks=tuple(times))
                    if not isinstance(report, Ticked):
                        timed.insert(0, TimedReport(at_s, report))
                if rank == 0 and name == Train.__name__:
                    num_ticks = int(timed[-1].at_s / TICK_S)
                    timed += [TimedReport(TICK_S * (1 + tick), Ticked(batch=tick)) for tick in range(num_ticks)]
                    timed.sort(key=lambda it: (it.at_s, isinstance(it.report, Paused)))
                script[name][-1].append(timed)
            if name == Train.__name__:
                began_at_step = reports_of_ranks[0][-1].progress.global_step  # type: ignore[union-attr]
    return script


class StandIn:
    """One rank of a StandInHost."""

    def __init__(self) -> None:
        self.outbox = Outbox(asyncio.get_running_loop())
        self.num_runs: Counter[str] = Counter()


class StandInHost:
    """Ray actor that answers as WorkerActor does, for many ranks: each method takes the rank first."""

    def __init__(self, script: Script, num_workers: int) -> None:
        self._script = script
        self._stand_ins: dict[int, StandIn] = {}
        self._num_workers = num_workers
        self._tasks: set[asyncio.Task[None]] = set()

    async def get_info(self, rank: int) -> ActorInfo:
        return ActorInfo(
            node_id=f"{rank // RANKS_PER_NODE:056x}",
            worker_id=f"{rank:056x}",
            ip=ray.util.get_node_ip_address(),
            host=f"node{rank // RANKS_PER_NODE}",
            gpu_ids=(),
            pid=os.getpid(),
            num_cores=RANKS_PER_NODE,
        )

    async def reports(self, rank: int) -> AsyncIterator[list[ActorMessage]]:
        outbox = self._stand_in(rank).outbox
        while True:
            yield await outbox.fetch()

    async def join(self, rank: int, *_: Any) -> None:
        self._finish_command(rank)

    async def assign(self, rank: int, assignment: Assignment, *_: Any) -> None:
        self._finish_command(rank)

    async def end_run(self, rank: int) -> None:
        self._finish_command(rank)

    async def submit(self, rank: int, command: Command, number: int) -> None:
        task = asyncio.create_task(self._play(rank, type(command).__name__))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def ping(self, rank: int) -> None: ...
    async def complete_checkpoint(self, rank: int, *_: Any) -> None: ...
    async def release_pending(self, rank: int, *_: Any) -> None: ...
    async def stop(self, rank: int) -> None: ...

    async def fill_draft(self, rank: int, kind: str, draft: str) -> bool:
        Path(draft).write_bytes(b"stand-in")
        return True

    def _stand_in(self, rank: int) -> StandIn:
        if rank not in self._stand_ins:
            self._stand_ins[rank] = StandIn()
        return self._stand_ins[rank]

    def _finish_command(self, rank: int) -> None:
        self._stand_in(rank).outbox.put(CommandDone(rank=rank))

    async def _play(self, rank: int, name: str) -> None:
        stand_in = self._stand_in(rank)
        run = self._script[name][stand_in.num_runs[name]]
        stand_in.num_runs[name] += 1
        started = time.monotonic()
        for timed in run[min(rank, 1)]:
            await asyncio.sleep(max(0.0, started + timed.at_s - time.monotonic()))
            report = timed.report
            stand_in.outbox.put(replace(report, rank=rank) if isinstance(report, Saved) else report)
        self._finish_command(rank)


class StandInActor:
    """Handle of one rank, in place of Ray's handle of a WorkerActor; counts the calls by method."""

    num_calls: ClassVar[Counter[str]] = Counter()

    def __init__(self, host: Any, rank: int) -> None:
        self._host = host
        self._rank = rank

    def __getattr__(self, name: str) -> "StandInMethod":
        return StandInMethod(getattr(self._host, name), self._rank, name)


@dataclass(frozen=True, slots=True)
class StandInMethod:
    """Method of a rank's handle."""

    method: Any
    rank: int
    name: str

    def options(self, **options: Any) -> "StandInMethod":
        return StandInMethod(self.method.options(**options), self.rank, self.name)

    def remote(self, *arguments: Any) -> Any:
        StandInActor.num_calls[self.name] += 1
        return self.method.remote(self.rank, *arguments)


class StandInGroup(ActorGroup):
    """The actor group with stand-ins as its actors."""

    script: ClassVar[Script]
    num_reports: ClassVar[Counter[str]] = Counter()

    def create_actors(self, placement: Any) -> list[Any]:
        host_class: Any = ray.remote(StandInHost)
        num_workers = self.workers.num_workers
        script = ray.put(self.script)
        self._hosts = [
            host_class.options(num_cpus=0, max_concurrency=4 * num_workers).remote(script, num_workers)
            for _ in range(NUM_HOSTS)
        ]
        return [StandInActor(self._hosts[rank * NUM_HOSTS // num_workers], rank) for rank in range(num_workers)]

    def kill_actors(self, actors: list[Any]) -> None:
        for host in self._hosts:
            ray.kill(host)

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        for rank, report in super().run(command):
            self.num_reports[type(report).__name__] += 1
            yield rank, report


@dataclass(frozen=True)
class Reading:
    """CPU time and traffic of the driver up to a moment."""

    cpu_s: float
    main_thread_s: float
    num_pings: int
    num_calls: int
    num_reports: int

    @classmethod
    def take(cls) -> "Reading":
        return cls(
            time.process_time(),
            time.thread_time(),
            StandInActor.num_calls["ping"],
            StandInActor.num_calls.total(),
            StandInGroup.num_reports.total(),
        )

    def __sub__(self, other: "Reading") -> "Reading":
        return Reading(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))


class Meter(pl.DriverCallback):
    """Readings of the driver's work by what it was for."""

    def __init__(self, directory: str) -> None:
        self.costs: dict[str, list[Reading]] = defaultdict(list)
        self.memory_bytes = 0
        self._directory = directory
        self._last: Reading | None = None
        self._began = Reading.take()
        self._evaluation_began = self._began
        self._has_paused = False

    def begin(self) -> None:
        self._memory_before = read_memory()
        self._began = Reading.take()

    def on_start(self, run: Any) -> None:
        self.costs["start"].append(Reading.take() - self._began)

    def next_pause_step(self, run: Any) -> int:
        step = run.state.progress.global_step
        epoch_length = STEPS_PER_INTERVAL * INTERVALS_PER_EPOCH
        return step - step % epoch_length + (PAUSE_AFTER if step % epoch_length < PAUSE_AFTER else epoch_length)

    def on_step_metrics(self, run: Any) -> None:
        now = Reading.take()
        if self._last is not None:
            self.costs["pause" if self._has_paused else "interval"].append(now - self._last)
        self._last, self._has_paused = now, False

    def on_train_pause(self, run: Any) -> None:
        self._has_paused = True

    def on_evaluation_start(self, run: Any, stage: str) -> None:
        self._evaluation_began = Reading.take()

    def on_evaluation_end(self, run: Any, stage: str) -> None:
        self.costs["validation"].append(Reading.take() - self._evaluation_began)

    def on_train_epoch_end(self, run: Any) -> None:
        self._last = None
        before = Reading.take()
        run.save_checkpoint(os.path.join(self._directory, f"{run.state.progress.global_step}.ckpt"))
        run.finish_saves()
        self.costs["save"].append(Reading.take() - before)

    def on_train_end(self, run: Any) -> None:
        self.memory_bytes = read_memory() - self._memory_before


def read_memory() -> int:
    """Resident memory of this process, without the pages that it shares with Ray's object store."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class Model(module_class(pl.LightningModule)):  # type: ignore[misc]
    """The benchmarks' module with a validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", functional.mse_loss(self.network(batch[0]), batch[1]))


def fit(num_workers: int, *, directory: str) -> Meter:
    model = Model(width=8, hidden=8, num_steps=10**9)
    meter = Meter(directory)
    trainer = pl.Trainer(
        num_workers=num_workers,
        max_epochs=NUM_EPOCHS,
        log_every_n_steps=STEPS_PER_INTERVAL,
        callbacks=[meter],
        resources_per_worker={"memory": 0},
        keep_workers_s=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # The real ranks' loaders: the stand-ins have none.
    num_samples = STEPS_PER_INTERVAL * INTERVALS_PER_EPOCH * 4 * 2
    train = DataLoader(dataset(num_samples, width=8), batch_size=4)
    meter.begin()
    trainer.fit(model, train, DataLoader(dataset(16, width=8), batch_size=4))
    return meter


def measure(num_workers: int, *, interval_s: float, profile: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as directory:
        local_cluster.connect()
        worker_pool.ActorGroup = RecordingGroup  # type: ignore[misc]
        fit(2, directory=directory)
        StandInGroup.script = build_script(RecordingGroup.recording, num_workers=num_workers, interval_s=interval_s)
        worker_pool.ActorGroup = StandInGroup  # type: ignore[misc]
        if profile:
            import cProfile

            profiler = cProfile.Profile(time.thread_time)
            meter = profiler.runcall(fit, num_workers, directory=directory)
            profiler.dump_stats(profile)
        else:
            meter = fit(num_workers, directory=directory)
    pl.shutdown()
    return {
        "num_workers": num_workers,
        "memory_mb": meter.memory_bytes / 2**20,
        **{
            f"{kind}_{name}": statistics.fmean(getattr(reading, name) for reading in readings)
            for kind, readings in meter.costs.items()
            for name in Reading.__dataclass_fields__
        },
    }


KINDS = {
    "interval": "logging interval",
    "pause": "interval with a pause",
    "validation": "validation",
    "save": "checkpoint",
    "start": "start",
}


def print_table(rows: list[dict[str, Any]]) -> None:
    print("driver's CPU time (of it in the main thread), in ms")
    print(f"{'workers':>8}" + "".join(f"{name:>24}" for name in KINDS.values()) + f"{'memory':>12}")
    for row in rows:
        cells = [f"{row[f'{kind}_cpu_s'] * 1e3:.1f} ({row[f'{kind}_main_thread_s'] * 1e3:.1f})" for kind in KINDS]
        memory = f"{row['memory_mb']:.1f} MB"
        print(f"{row['num_workers']:>8}" + "".join(f"{cell:>24}" for cell in cells) + f"{memory:>12}")
    print("calls to workers (pings among them), reports from them")
    for row in rows:
        cells = [
            f"{row[f'{kind}_num_calls']:.0f} ({row[f'{kind}_num_pings']:.0f}), {row[f'{kind}_num_reports']:.0f}"
            for kind in KINDS
        ]
        print(f"{row['num_workers']:>8}" + "".join(f"{cell:>24}" for cell in cells))


def draw_plot(rows: list[dict[str, Any]], path: str) -> None:
    """Draw the CPU times over the number of workers, both logarithmic, with a line of linear growth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    sizes = [row["num_workers"] for row in rows]
    for kind, name in KINDS.items():
        axes.plot(sizes, [row[f"{kind}_cpu_s"] * 1e3 for row in rows], marker="o", label=name)
    axes.plot(sizes, [size / 10 for size in sizes], linestyle=":", color="grey", label="linear growth")
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="CPU time of the driver (ms)")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, nargs="+", default=[64, 256, 1000])
    parser.add_argument("--interval-s", type=float, default=1.0, help="duration of a logging interval")
    parser.add_argument("--plot", default="", help="file for a plot (.svg, .png)")
    parser.add_argument("--profile", default="", help="file for a profile of the driver's main thread (cProfile)")
    args = parser.parse_args()
    if len(args.num_workers) == 1 and not args.plot:
        row = measure(args.num_workers[0], interval_s=args.interval_s, profile=args.profile)
        print_table([row])
        print(json.dumps(row))
        return
    rows = []
    for num_workers in args.num_workers:  # each in a process of its own, whose memory is new
        command = [sys.executable, __file__, "--num-workers", str(num_workers), "--interval-s", str(args.interval_s)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    print_table(rows)
    if args.plot:
        draw_plot(rows, args.plot)


if __name__ == "__main__":
    main()
