"""Session: the objects that the loops of one stage share, built when the stage starts."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from raylit.accelerators import Accelerator
from raylit.accelerators.transfer import BatchForm, set_layout
from raylit.checkpoint import format
from raylit.compat.torch_dynamo import compile_again, drop_compiled, isolate_script_globals
from raylit.config import Plan
from raylit.core.module import LightningModule
from raylit.precision import build_precision
from raylit.profilers.base import time_items
from raylit.protocol.messages import Measured, RankTimes
from raylit.protocol.state import Stage
from raylit.seed import diverge_random_state
from raylit.strategies import build_strategy
from raylit.worker.collectives import Collectives
from raylit.worker.data.batches import Mover, build_mover
from raylit.worker.data.sampling import RandomState
from raylit.worker.job import Job, StopBarrier, WorkerContext
from raylit.worker.loops.hooks import Hooks, is_overridden
from raylit.worker.process.compiling import CompilationWatch, compile_parts
from raylit.worker.uneven_inputs import UnevenSteps
from raylit.worker.view import TrainerView

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_PREPARE_TIMEOUT_S = 24 * 3600.0
"""A download in `prepare_data` may take hours on one host while the others wait."""


class Session:
    """The user's objects on this rank and what runs them: view, hooks, strategy, precision, device."""

    def __init__(
        self,
        *,
        stage: Stage,
        plan: Plan,
        context: WorkerContext,
        job: Job,
        collectives: Collectives,
        accelerator: Accelerator,
        stop_barrier: StopBarrier,
    ) -> None:
        self.stage = stage
        self.plan = plan
        self.context = context
        self.job = job
        self.collectives = collectives
        self.stop_barrier = stop_barrier
        self.module = job.module
        self.accelerator = accelerator
        self.device = accelerator.device()
        self.strategy = build_strategy(plan)
        self.precision = build_precision(
            plan.optimization.precision, self.device, build_scaler=self.strategy.build_scaler
        )
        self.view = TrainerView(plan=plan, context=context, job=job, stage=stage)
        self.view.strategy = self.strategy
        self.clock = IntervalClock(self.view)
        self.uneven = UnevenSteps(collectives, module=job.module, view=self.view, device=self.device)
        self.profiler = job.profiler
        self.hooks = Hooks(view=self.view, module=job.module, callbacks=job.callbacks, profiler=job.profiler)
        self.mover = self._build_mover()
        """Moves batches to the device; None where they need neither hooks nor a transfer."""
        self.eval_mover = self._build_mover(is_same_on_all_ranks=True) if accelerator.is_one_graph else self.mover
        """Moves batches of an evaluation or prediction."""
        is_finishing = type(accelerator).after_evaluation_batch is not Accelerator.after_evaluation_batch
        self.finish_evaluation_batch = accelerator.after_evaluation_batch if is_finishing else None
        """Called after each batch of an evaluation or prediction; None where the accelerator needs no such call."""
        self._step_hooks: list[RemovableHandle] = []
        """A profiler's hooks on the user's objects."""
        self._compiled_modules: list[nn.Module] = []
        self._compilations: CompilationWatch | None = None
        self._pending_random_state: dict[str, Any] | None = None

    def _build_mover(self, *, is_same_on_all_ranks: bool = False) -> Mover | None:
        optimization = self.plan.optimization
        mover = build_mover(
            module=self.job.module,
            datamodule=self.job.datamodule,
            accelerator=self.accelerator,
            form=BatchForm(floating_dtype=self.precision.weights_dtype, is_channels_last=optimization.is_channels_last),
            is_same_on_all_ranks=is_same_on_all_ranks,
        )
        if mover is not None and self.profiler is not None:
            mover.measure_with(self.profiler)
        return mover

    def set_up(self) -> None:
        """Prepare the data, call `setup` of all objects and place the module on its device. Collective."""
        job = self.job
        self.module.attach_run(self.view)
        if job.datamodule is not None:
            job.datamodule.trainer = self.view
        for owner in (job.datamodule, self.module):
            if owner is not None and self._prepares_data(owner):
                self.measure_call(f"{type(owner).__name__}.prepare_data", owner.prepare_data)()
        self.collectives.barrier(timeout_s=_PREPARE_TIMEOUT_S)
        self._broadcast_random_state()
        self.hooks.set_up(self.stage, job.datamodule)
        with self.strategy.build_context():
            self.module.configure_model()
        self.strategy.place(
            self.module,
            device=self.device,
            dtype=self.precision.weights_dtype,
            steps=[name for name in _STEPS if is_overridden(name, self.module, LightningModule)],
            is_manual=self.stage == "fit" and not self.module.automatic_optimization,
        )
        # A shard has no such layout; gathered weights take the layout of the images.
        if self.plan.optimization.is_channels_last and not self.strategy.is_sharding:
            set_layout(self.module, torch.channels_last)
        self._compile()
        if self.profiler is not None:
            self._step_hooks += self.profiler.attach(self.module)
        if self.stage == "fit":
            self.strategy.set_up(self.module, device=self.device)

    def _broadcast_random_state(self) -> None:
        """Set every rank's random state to that of rank 0.

        Only some ranks prepare the data and may have drawn random numbers for it. `setup` and the rest before
        `seed_rank` must draw the same numbers on all ranks, as they split data sets with them.
        """
        if self.collectives.world_size > 1:
            state: RandomState = self.collectives.gather_objects(
                RandomState.capture() if self.context.rank == 0 else None
            )[0]
            state.restore()

    def _compile(self) -> None:
        """Compile the modules that the user has compiled, and what the Trainer's options ask for."""
        options = self.plan.optimization.compile_options
        self._compiled_modules = compile_again(self.module, self.job.compilations)
        if options is not None:
            self._compiled_modules += compile_parts(self.module, options, host=self.context.host)
        if options is not None or self.job.compilations:
            isolate_script_globals(self.module)
            self._compilations = CompilationWatch()

    def _prepares_data(self, owner: Any) -> bool:
        """Return whether this rank prepares the data: one rank of each host, or one in all."""
        is_per_node = self.plan.prepares_per_node and getattr(owner, "prepare_data_per_node", True)
        return (self.context.local_rank if is_per_node else self.context.rank) == 0

    @property
    def compilation_s(self) -> float:
        """Seconds in which this process has compiled for the run so far."""
        return 0.0 if self._compilations is None else self._compilations.total_s

    def measure_call(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the call, measured by the profiler if there is one."""
        return call if self.profiler is None else time_items(self.profiler, name, call)

    def watch_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the optimizer's steps if there is a profiler, and call the accelerator's `after_step` after each."""
        profiler = self.profiler
        if profiler is not None:
            self._step_hooks.append(optimizer.register_step_pre_hook(lambda *_: profiler.start("optimizer_step")))
            self._step_hooks.append(optimizer.register_step_post_hook(lambda *_: profiler.stop("optimizer_step")))
        if type(self.accelerator).after_step is not Accelerator.after_step:
            self._step_hooks.append(optimizer.register_step_post_hook(lambda *_: self.accelerator.after_step()))

    def seed_rank(self) -> None:
        """Set a different random state of torch, NumPy and Python on every rank except rank 0.

        Equal dropout masks and augmentations on all ranks would waste samples. Rank 0 continues the driver's random
        state, as a single process would. The processes of a DataLoader follow: torch seeds them from this process's
        generator.
        """
        if self.context.rank > 0:
            diverge_random_state(self.context.rank)
            if not self.accelerator.is_one_graph:
                self.accelerator.seed(torch.initial_seed())

    def continue_random_state_at_next_batch(self, state: dict[str, Any]) -> None:
        """Keep a checkpoint's random state for `restore_random_state`."""
        self._pending_random_state = state

    def restore_random_state(self) -> None:
        """Set a checkpoint's random state once the loader's iterator has been created.

        Creating the iterator draws a number.
        """
        if self._pending_random_state is not None:
            format.set_random_state(self._pending_random_state, self.accelerator)
            self._pending_random_state = None

    def step_context(self) -> AbstractContextManager[object]:
        """Return the precision's context for a step."""
        return self.precision.step_context()

    def tear_down(self) -> None:
        """Call `teardown` of all objects and restore the module for use outside of the run."""
        if self.plan.optimization.compile_options is not None and self._compilations is not None:
            self._compilations.check_use()
        try:
            self.hooks.tear_down(self.stage, self.job.datamodule)
        finally:
            if self.view.handles is not None:
                self.view.handles.close()
            self.strategy.tear_down()
            self.strategy.restore_module(self.module)
            if self.plan.optimization.is_channels_last:
                set_layout(self.module, torch.contiguous_format)
            self.release()

    def release(self) -> None:
        """Detach the run from the user's objects, however it has ended."""
        self.module.attach_run(None)
        self.module.redirect_log(None)
        for hook in self._step_hooks:
            hook.remove()
        drop_compiled(self._compiled_modules)
        if self._compilations is not None:
            self._compilations.close()
        if self.job.datamodule is not None:
            self.job.datamodule.trainer = None


class IntervalClock:
    """Clock of one rank for the interval between two logging steps: steps add to it, and only logging steps read it.

    In a step of data parallelism the ranks wait for each other in the backward pass, inside of which the gradients are
    reduced. All times are those of the host, which on a GPU launches kernels and does not wait for them.
    """

    def __init__(self, view: TrainerView) -> None:
        """Create the clock of the run whose steps and batches the view counts."""
        self._view = view
        self.backward_s = 0.0
        """Seconds of backward passes in this interval; written by automatic optimization."""
        self._began_at = 0.0
        self._data_wait_s = 0.0
        self._num_steps = self._num_batches = 0

    def restart(self, *, data_wait_s: float) -> None:
        """Begin an interval at the command's data wait so far."""
        self._num_steps, self._num_batches = self._view.num_windows, self._view.total_batches
        self.backward_s = 0.0
        self._data_wait_s = data_wait_s
        self._began_at = perf_counter()

    def read(self, *, data_wait_s: float) -> list[float]:
        """Return this rank's numbers for `build_report`."""
        return [perf_counter() - self._began_at, data_wait_s - self._data_wait_s, self.backward_s]

    def build_report(self, rows: Sequence[Sequence[float]], *, batch_size: int) -> Measured:
        """Return the report of all ranks' numbers, one row for each rank; `batch_size` is that of the last batch."""
        return Measured(
            num_steps=self._view.num_windows - self._num_steps,
            num_samples=(self._view.total_batches - self._num_batches) * batch_size,
            ranks=tuple(
                RankTimes(elapsed_s=elapsed_s, data_wait_s=data_wait_s, backward_s=backward_s)
                for elapsed_s, data_wait_s, backward_s in rows
            ),
        )
