"""The whole state of a run on one worker: captured for a checkpoint, and loaded from one."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raylit.callbacks.base import Callback
from raylit.checkpoint import files, format
from raylit.checkpoint import sharded as directories
from raylit.checkpoint.layout import METADATA, name_of_part
from raylit.checkpoint.pending import HostCopy, PendingCheckpoint, PendingPart
from raylit.core.hparams import check_weights
from raylit.core.module import LightningModule
from raylit.errors import CheckpointError
from raylit.protocol.messages import Part, Save, Saved
from raylit.storage import is_url, join
from raylit.strategies.sharded_state import Reader
from raylit.worker.collectives import Collectives
from raylit.worker.job import WorkerContext
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.loops.train import TrainLoop
from raylit.worker.optimization.configured import Schedule
from raylit.worker.session import Session

_WRITE_TIMEOUT_S = 3600.0
"""The other ranks wait for rank 0's disk."""


class StateCapture:
    """Captures the state of a session for a checkpoint and loads it from one."""

    def __init__(
        self, session: Session, *, optimizers: list[Any], schedules: list[Schedule], loop: TrainLoop | None
    ) -> None:
        self._session = session
        self._optimizers = optimizers
        self._schedules = schedules
        self._loop = loop
        self._host_copy = HostCopy(session.accelerator)
        self._part_copy = HostCopy(session.accelerator)
        self.pending: PendingCheckpoint | None = None
        """On rank 0: the checkpoint that the driver's last `Save` asked for."""
        self.pending_part: PendingPart | None = None
        """This rank's part of it, where checkpoints are written in parts."""
        self.driver_states: dict[str, Any] = {}
        """States of the driver's callbacks by key, at the start of the current command, for checkpoints from hooks."""

    def prepare(self, command: Save) -> Saved:
        """Prepare the whole run for writing on rank 0, and on each rank its part or its own state.

        Collective where sharded state is gathered.

        Raises:
            CheckpointError: Something in the state is not plain.
        """
        session = self._session
        rank = session.context.rank
        self.pending, self.pending_part = None, None
        saved = self._capture(is_weights_only=command.is_weights_only)
        is_copying = command.is_copying or session.device.type != "cpu"
        if session.plan.strategy.is_saving_parts:
            self.pending_part = PendingPart(
                session.strategy.parts(session.module, self._saved_optimizers(command.is_weights_only)),
                rank=rank,
                copy_tensors=self._part_copy.copy_state if is_copying else None,
                on_release=self._part_copy.lend,
            )
        if rank > 0:
            return Saved(rank=rank, checkpoint={}, of_rank=format.to_plain_values(saved.of_rank, "the rank's state"))
        checkpoint = format.merge([saved], command.driver_part)
        if is_copying:
            checkpoint = self._host_copy.copy_state(checkpoint)
        self.pending = PendingCheckpoint(checkpoint, on_release=self._host_copy.lend)
        return Saved(rank=0, checkpoint={}, of_rank={})

    def wait_for_all_ranks(self) -> None:
        """Wait for all ranks before `write` in the user's code. Collective."""
        self._session.collectives.wait_for_all_ranks("trainer.save_checkpoint")

    def write(self, path: Any, *, is_weights_only: bool) -> None:
        """Write a checkpoint of the current state: rank 0 writes it, and each rank its part of sharded state.

        Collective.

        Raises:
            CheckpointError: Writing failed; raised on rank 0 or, where there are parts, on all ranks.
        """
        session = self._session
        saved = self._capture(is_weights_only=is_weights_only)
        # torch.save, as torch tensors of NumPy's unsigned types cannot be pickled.
        buffer = io.BytesIO()
        torch.save(format.to_plain_values(saved.of_rank, "the rank's state"), buffer)
        states_of_ranks = session.collectives.gather_objects(buffer.getvalue())
        pending: PendingCheckpoint | None = None
        if session.context.rank == 0:
            checkpoint = format.merge([saved], {} if is_weights_only else self._driver_part)
            pending = PendingCheckpoint(self._copy_to_host(checkpoint), on_release=lambda: None)
            other_states = [torch.load(io.BytesIO(state), weights_only=True) for state in states_of_ranks[1:]]
            pending.complete(other_states, {})
        if session.plan.strategy.is_saving_parts:
            parts = session.strategy.parts(session.module, self._saved_optimizers(is_weights_only))
            write_in_parts(path, pending, parts, context=session.context, collectives=session.collectives)
        elif pending is not None:
            pending.write(path)
        session.collectives.barrier(timeout_s=_WRITE_TIMEOUT_S)

    def write_alone(self, path: Any) -> None:
        """Write a checkpoint from this rank alone, without the states of the other ranks.

        Raises:
            CheckpointError: This rank has only a part of a sharded model, or writing failed.
        """
        if self._session.strategy.is_sharding:
            raise CheckpointError(f"cannot write {path}: a single rank has only its part of a model that is sharded")
        rank_state = self._capture_rank_state() if self._session.context.world_size == 1 else {}
        checkpoint = format.merge(
            [Saved(rank=0, checkpoint=self._capture_checkpoint(is_weights_only=False), of_rank=rank_state)],
            self._driver_part,
        )
        if not rank_state:
            checkpoint["raylit"]["ranks"] = []
        files.write(self._copy_to_host(checkpoint), path)

    def apply(self, checkpoint: dict[str, Any], *, is_resuming: bool) -> None:
        """Load weights; when resuming also optimizers, schedulers, callbacks, random state and position."""
        session = self._session
        if not session.strategy.is_sharding and self._is_checkpoint_read_by_hooks():
            checkpoint = directories.read_whole(checkpoint)
        session.module.on_load_checkpoint(checkpoint)
        read = self._open_reader(checkpoint)
        check_weights(session.module, checkpoint["state_dict"], source=self._source)
        session.strategy.load_weights(session.module, checkpoint["state_dict"], read=read)
        if not is_resuming:
            return
        if "optimizer_states" not in checkpoint:
            raise CheckpointError(
                f"{self._source} holds weights only: fit cannot resume from it; load it into the model"
            )
        if session.job.datamodule is not None:
            session.job.datamodule.load_state_dict(checkpoint.get(type(session.job.datamodule).__qualname__, {}))
        for callback in session.job.callbacks:
            callback.on_load_checkpoint(session.view, session.module, checkpoint)
            if callback.state_key in checkpoint.get("callbacks", {}):
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
        self._apply_optimizers(checkpoint, read)
        if session.precision.scaler is not None and (scale := format.read_scaler_state(checkpoint)) is not None:
            session.precision.scaler.load_state_dict(scale)
        self._apply_position(checkpoint)

    def _capture(self, *, is_weights_only: bool) -> Saved:
        """Capture the whole run on rank 0, and on the others their own state, without copying tensors.

        Collective where sharded state is gathered.
        """
        session = self._session
        rank, strategy = session.context.rank, session.strategy
        checkpoint = {}
        if rank == 0:
            checkpoint = self._capture_checkpoint(is_weights_only)
        elif strategy.is_gathering:
            optimizers = self._saved_optimizers(is_weights_only)
            for state in (session.module.state_dict(), *(optimizer.state_dict() for optimizer in optimizers)):
                strategy.collect_state(state)
        return Saved(rank=rank, checkpoint=checkpoint, of_rank={} if is_weights_only else self._capture_rank_state())

    def _saved_optimizers(self, is_weights_only: bool) -> list[Any]:
        return [] if is_weights_only else self._optimizers

    def _is_checkpoint_read_by_hooks(self) -> bool:
        """Return whether hooks read the checkpoint before it is loaded, and may expect all of it."""
        job = self._session.job
        return is_overridden("on_load_checkpoint", job.module, LightningModule) or any(
            is_overridden("on_load_checkpoint", callback, Callback) for callback in job.callbacks
        )

    def _open_reader(self, checkpoint: dict[str, Any]) -> Reader | None:
        """Open a reader of sharded tensors; check this rank's share of the files if they are on a local file system."""
        directory = directories.place_of(checkpoint)
        if directory is not None and not is_url(directory):
            context = self._session.context
            if not directories.is_checkpoint(Path(directory)):
                raise CheckpointError(
                    f"worker {context.rank} on {context.host} cannot see {directory}, of which each reads its part: "
                    "put it where all hosts see it, or make one file of it, which the driver sends: raylit checkpoint "
                    f"consolidate {directory} FILE"
                )
            directories.check(checkpoint, directory, share=(context.rank, context.world_size))
        return directories.open_reader(checkpoint)

    def _copy_to_host(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Copy to separate host memory, as another copy may be in use by a write."""
        session = self._session
        return checkpoint if session.device.type == "cpu" else HostCopy(session.accelerator).copy_state(checkpoint)

    @property
    def _driver_part(self) -> dict[str, Any]:
        return {"callbacks": self.driver_states, "seed": self._session.plan.seed}

    def _capture_rank_state(self) -> dict[str, Any]:
        if self._loop is None:
            return {}
        return {"random": format.random_state(self._session.accelerator), **self._loop.rank_state()}

    def _capture_checkpoint(self, is_weights_only: bool) -> dict[str, Any]:
        session = self._session
        module, view, datamodule = session.module, session.view, session.job.datamodule
        strategy = session.strategy
        weights = strategy.collect_state(module.state_dict())
        checkpoint = format.checkpoint_from_weights(weights, view.progress, module=module, datamodule=datamodule)
        if not is_weights_only:
            checkpoint["optimizer_states"] = [
                strategy.collect_state(optimizer.state_dict()) for optimizer in self._optimizers
            ]
            checkpoint["lr_schedulers"] = [schedule.scheduler.state_dict() for schedule in self._schedules]
            checkpoint["callbacks"] = {
                callback.state_key: state for callback in session.job.callbacks if (state := callback.state_dict())
            }
            if session.precision.scaler is not None:
                checkpoint[format.SCALER] = session.precision.scaler.state_dict()
            if datamodule is not None and (state := datamodule.state_dict()):
                checkpoint[type(datamodule).__qualname__] = state
            for callback in session.job.callbacks:
                callback.on_save_checkpoint(view, module, checkpoint)
        module.on_save_checkpoint(checkpoint)
        return checkpoint

    def _apply_optimizers(self, checkpoint: dict[str, Any], read: Reader | None) -> None:
        states, schedule_states = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        for kind, saved, current in (
            ("optimizers", states, self._optimizers),
            ("learning rate schedulers", schedule_states, self._schedules),
        ):
            if len(saved) != len(current):
                raise self._build_mismatch_error(
                    f"is of a run with {len(saved)} {kind}, and there are {len(current)} now"
                )
        settings = [list(optimizer.defaults) for optimizer in self._optimizers]
        try:
            self._session.strategy.load_optimizer_states(self._optimizers, states, read=read)
        except (KeyError, ValueError) as error:
            raise self._build_mismatch_error(f"has optimizer states that do not fit: {error}") from error
        for optimizer, needed in zip(self._optimizers, settings, strict=True):
            # torch accepts groups of another optimizer class and fails at the next step, where they lack a setting.
            if missing := [name for name in needed if any(name not in group for group in optimizer.param_groups)]:
                raise self._build_mismatch_error(f"has no {', '.join(missing)} for {type(optimizer).__name__}")
        for schedule, state in zip(self._schedules, schedule_states, strict=True):
            schedule.scheduler.load_state_dict(state)

    @property
    def _source(self) -> str:
        """The checkpoint's name in errors."""
        return self._session.job.ckpt_path or "the checkpoint"

    def _build_mismatch_error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._source} {what}: fit resumes with the optimizers and schedulers that it was saved with. For a new "
            "run from its weights there is load_from_checkpoint(path)"
        )

    def _apply_position(self, checkpoint: dict[str, Any]) -> None:
        session = self._session
        progress = format.read_progress(checkpoint)
        session.view.move_to(progress)
        ranks = format.read_rank_states(checkpoint)
        if not ranks or self._loop is None:
            return
        if len(ranks) != session.context.world_size:
            # With another world size the saved random states fit no rank.
            self._loop.load_redistributed_states(ranks)
            return
        rank_state = ranks[session.context.rank]
        self._loop.load_rank_state(rank_state)
        if progress.is_inside_epoch:
            session.continue_random_state_at_next_batch(rank_state["random"])
        else:
            format.set_random_state(rank_state["random"], session.accelerator)


def write_in_parts(
    path: Any,
    pending: PendingCheckpoint | None,
    tensors: Mapping[str, Tensor],
    *,
    context: WorkerContext,
    collectives: Collectives,
) -> None:
    """Write a checkpoint as a directory: rank 0 the common file, each rank its tensors. Collective.

    Args:
        path: Path or URL of the directory.
        pending: On rank 0: the checkpoint without the tensors.
        tensors: This rank's tensors.
        context: The worker's ranks and host.
        collectives: The ranks that write.

    Raises:
        CheckpointError: Writing failed on a rank; raised on all ranks.
    """
    draft, error = None, ""
    if pending is not None:
        try:
            draft = files.directory_draft(path)
        except CheckpointError as raised:
            error = str(raised)
    try:
        [(draft_path, error), *_] = collectives.gather_objects(("" if draft is None else draft.place, error))
        part = Part(rank=context.rank, num_bytes=0, crc=0, chunks=())
        if not error:
            try:
                part = _write_part(draft_path, tensors, context=context)
            except CheckpointError as raised:
                error = str(raised)
        parts_of_ranks = collectives.gather_objects((part, error))
        errors = [one for _, one in parts_of_ranks if one]
        if pending is not None and draft is not None and not errors:
            try:
                metadata = pending.add_parts([part for part, _ in parts_of_ranks], subdirectory=draft.subdirectory)
                files.write_bytes(metadata, join(draft.place, METADATA))
                pending.write(draft.index)
                draft.publish()
            except CheckpointError as raised:
                errors = [str(raised)]
        [errors, *_] = collectives.gather_objects(errors)
    finally:
        if draft is not None:
            draft.discard()
    if errors:
        failure = CheckpointError(errors[0])
        if draft_path:  # else there was no draft
            files.name_target(failure, draft=draft_path, target=path)
        raise failure


def _write_part(draft_path: str, tensors: Mapping[str, Tensor], *, context: WorkerContext) -> Part:
    if not is_url(draft_path) and not os.path.isdir(draft_path):
        raise CheckpointError(
            f"worker {context.rank} on {context.host} cannot see {draft_path}, which rank 0 has made: what a hook "
            "saves in parts has to go to a file system that all hosts share, or to a URL; ModelCheckpoint needs neither"
        )
    part = PendingPart(tensors, rank=context.rank)
    part.write(join(draft_path, name_of_part(context.rank)))
    return part.describe()
