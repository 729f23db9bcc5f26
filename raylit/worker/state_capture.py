"""The whole state of a run on one worker: taken for a checkpoint, and loaded from one."""

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
from raylit.checkpoint.host_copy import HostCopy
from raylit.checkpoint.pending import PendingCheckpoint, PendingPart
from raylit.checkpoint.sharded import METADATA, name_of_part
from raylit.core.hparams import check_weights
from raylit.core.module import LightningModule
from raylit.errors import CheckpointError
from raylit.protocol.messages import Part, Save, Saved
from raylit.storage import is_url, join
from raylit.strategies.sharded_state import Reader
from raylit.worker.distributed.collectives import Collectives
from raylit.worker.job import WorkerContext
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.loops.train import TrainLoop
from raylit.worker.optimization.configured import Schedule
from raylit.worker.session import Session

_WRITE_TIMEOUT_S = 3600.0
"""The others wait for rank 0's disk."""


class StateCapture:
    """Takes the state of a fit session and puts it back."""

    def __init__(
        self, session: Session, *, optimizers: list[Any], schedules: list[Schedule], loop: TrainLoop | None
    ) -> None:
        self._session = session
        self._optimizers = optimizers
        self._schedules = schedules
        self._loop = loop
        self._host_copy = HostCopy()
        self._part_copy = HostCopy()
        self.held: PendingCheckpoint | None = None
        """The checkpoint that the driver has asked for last, on rank 0."""
        self.held_part: PendingPart | None = None
        """This rank's part of it, where checkpoints are in parts."""
        self.driver_states: dict[str, Any] = {}
        """Of the driver's callbacks, by key, as the command under way found them: for what hooks write."""

    def hold(self, command: Save) -> Saved:
        """Keep the whole run ready to be written on rank 0, and on each rank its part; what this rank alone has, on the
        others. Collective where sharded state is brought together.

        CheckpointError: something in it is not plain.
        """
        session = self._session
        rank = session.context.rank
        self.held, self.held_part = None, None
        own = self._take(is_weights_only=command.is_weights_only)
        is_copying = command.is_copying or session.device.type != "cpu"
        if session.plan.strategy.is_saving_parts:
            self.held_part = PendingPart(
                session.strategy.parts(session.module, self._saved_optimizers(command.is_weights_only)),
                rank=rank,
                copied=self._part_copy.taken if is_copying else None,
                on_release=self._part_copy.lend,
            )
        if rank > 0:
            return Saved(rank=rank, checkpoint={}, of_rank=format.to_plain_values(own.of_rank, "the rank's state"))
        checkpoint = format.merge([own], command.driver_part)
        if is_copying:
            checkpoint = self._host_copy.taken(checkpoint)
        self.held = PendingCheckpoint(checkpoint, on_release=self._host_copy.lend)
        return Saved(rank=0, checkpoint={}, of_rank={})

    def meet(self) -> None:
        """Before `write`, where the user's code calls it."""
        self._session.collectives.meet("trainer.save_checkpoint")

    def write(self, path: Any, *, is_weights_only: bool) -> None:
        """A checkpoint of this moment, written by rank 0; of sharded state each rank's part by itself. Collective.

        CheckpointError: it did not work, on rank 0 or, where there are parts, on all ranks.
        """
        session = self._session
        own = self._take(is_weights_only=is_weights_only)
        # torch's own format, as its tensors of NumPy's unsigned types cannot be pickled.
        buffer = io.BytesIO()
        torch.save(format.to_plain_values(own.of_rank, "the rank's state"), buffer)
        ranked = session.collectives.gather_objects(buffer.getvalue())
        held: PendingCheckpoint | None = None
        if session.context.rank == 0:
            checkpoint = format.merge([own], {} if is_weights_only else self._driver_part)
            held = PendingCheckpoint(self._on_host(checkpoint), on_release=lambda: None)
            others = [torch.load(io.BytesIO(state), weights_only=True) for state in ranked[1:]]
            held.complete(others, {})
        if session.plan.strategy.is_saving_parts:
            parts = session.strategy.parts(session.module, self._saved_optimizers(is_weights_only))
            write_in_parts(path, held, parts, context=session.context, collectives=session.collectives)
        elif held is not None:
            held.write(path)
        session.collectives.barrier(timeout_s=_WRITE_TIMEOUT_S)

    def write_alone(self, path: Any) -> None:
        """The same by this rank alone, without what only the others have. CheckpointError: it has a part only."""
        if self._session.strategy.is_sharding:
            raise CheckpointError(f"cannot write {path}: a single rank has only its part of a model that is sharded")
        of_rank = self._of_rank() if self._session.context.world_size == 1 else {}
        checkpoint = format.merge(
            [Saved(rank=0, checkpoint=self._whole(is_weights_only=False), of_rank=of_rank)],
            self._driver_part,
        )
        if not of_rank:
            checkpoint["raylit"]["ranks"] = []
        files.write(self._on_host(checkpoint), path)

    def apply(self, checkpoint: dict[str, Any], *, is_resuming: bool) -> None:
        """Weights; when resuming also optimizers, schedulers, callbacks, random state and position."""
        session = self._session
        if not session.strategy.is_sharding and self._is_looked_into():
            checkpoint = directories.read_whole(checkpoint)
        session.module.on_load_checkpoint(checkpoint)
        read = self._reader(checkpoint)
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

    def _take(self, *, is_weights_only: bool) -> Saved:
        """The whole run on rank 0, what this rank alone has on the others; its tensors are the training's own."""
        session = self._session
        rank, strategy = session.context.rank, session.strategy
        checkpoint = {}
        if rank == 0:
            checkpoint = self._whole(is_weights_only)
        elif strategy.is_gathering:
            optimizers = self._saved_optimizers(is_weights_only)
            for state in (session.module.state_dict(), *(optimizer.state_dict() for optimizer in optimizers)):
                strategy.collect_state(state)
        return Saved(rank=rank, checkpoint=checkpoint, of_rank={} if is_weights_only else self._of_rank())

    def _saved_optimizers(self, is_weights_only: bool) -> list[Any]:
        return [] if is_weights_only else self._optimizers

    def _is_looked_into(self) -> bool:
        """Hooks see the checkpoint before it is loaded, and may expect all of it."""
        job = self._session.job
        return is_overridden("on_load_checkpoint", job.module, LightningModule) or any(
            is_overridden("on_load_checkpoint", callback, Callback) for callback in job.callbacks
        )

    def _reader(self, checkpoint: dict[str, Any]) -> Reader | None:
        """Of what the checkpoint has placeholders for. Checks this rank's share of the files where they are near."""
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

    def _on_host(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """In memory of its own, as another copy may be on its way to a file."""
        return checkpoint if self._session.device.type == "cpu" else HostCopy().taken(checkpoint)

    @property
    def _driver_part(self) -> dict[str, Any]:
        return {"callbacks": self.driver_states, "seed": self._session.plan.seed}

    def _of_rank(self) -> dict[str, Any]:
        return {} if self._loop is None else {"random": format.random_state(), **self._loop.state_of_rank()}

    def _whole(self, is_weights_only: bool) -> dict[str, Any]:
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
        states, of_schedules = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
        for what, saved, own in (
            ("optimizers", states, self._optimizers),
            ("learning rate schedulers", of_schedules, self._schedules),
        ):
            if len(saved) != len(own):
                raise self._unfit(f"is of a run with {len(saved)} {what}, and there are {len(own)} now")
        settings = [list(optimizer.defaults) for optimizer in self._optimizers]
        try:
            self._session.strategy.load_optimizer_states(self._optimizers, states, read=read)
        except (KeyError, ValueError) as error:
            raise self._unfit(f"has optimizer states that do not fit: {error}") from error
        for optimizer, needed in zip(self._optimizers, settings, strict=True):
            # torch takes the groups of another class as they are, and misses what they lack at the next step.
            if missing := [name for name in needed if any(name not in group for group in optimizer.param_groups)]:
                raise self._unfit(f"has no {', '.join(missing)} for {type(optimizer).__name__}")
        for schedule, state in zip(self._schedules, of_schedules, strict=True):
            schedule.scheduler.load_state_dict(state)

    @property
    def _source(self) -> str:
        """How errors call the checkpoint."""
        return self._session.job.ckpt_path or "the checkpoint"

    def _unfit(self, what: str) -> CheckpointError:
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
            # Random numbers belong to ranks that were.
            self._loop.load_states_of_others(ranks)
            return
        of_rank = ranks[session.context.rank]
        self._loop.load_state_of_rank(of_rank)
        if progress.is_inside_epoch:
            session.continue_random_state_at_next_batch(of_rank["random"])
        else:
            format.set_random_state(of_rank["random"])


def write_in_parts(
    path: Any,
    held: PendingCheckpoint | None,
    tensors: Mapping[str, Tensor],
    *,
    context: WorkerContext,
    collectives: Collectives,
) -> None:
    """Rank 0 makes a directory at the path or URL, which has all else in `held`; each rank writes its `tensors` there.

    Collective. CheckpointError, on all ranks: it did not work on one of them.
    """
    draft, error = None, ""
    if held is not None:
        try:
            draft = files.directory_draft(path)
        except CheckpointError as raised:
            error = str(raised)
    try:
        [(place, error), *_] = collectives.gather_objects(("" if draft is None else draft.place, error))
        written = Part(rank=context.rank, num_bytes=0, crc=0, chunks=())
        if not error:
            try:
                written = _written(place, tensors, context=context)
            except CheckpointError as raised:
                error = str(raised)
        ranked = collectives.gather_objects((written, error))
        errors = [one for _, one in ranked if one]
        if held is not None and draft is not None and not errors:
            try:
                metadata = held.add_parts([part for part, _ in ranked], subdirectory=draft.subdirectory)
                files.write_bytes(metadata, join(draft.place, METADATA))
                held.write(draft.index)
                draft.publish()
            except CheckpointError as raised:
                errors = [str(raised)]
        [errors, *_] = collectives.gather_objects(errors)
    finally:
        if draft is not None:
            draft.discard()
    if errors:
        failure = CheckpointError(errors[0])
        if place:  # else there was no draft
            files.name_target(failure, draft=place, target=path)
        raise failure


def _written(place: str, tensors: Mapping[str, Tensor], *, context: WorkerContext) -> Part:
    if not is_url(place) and not os.path.isdir(place):
        raise CheckpointError(
            f"worker {context.rank} on {context.host} cannot see {place}, which rank 0 has made: what a hook saves in "
            "parts has to go to a file system that all hosts share, or to a URL; ModelCheckpoint needs neither"
        )
    part = PendingPart(tensors, rank=context.rank)
    part.write(join(place, name_of_part(context.rank)))
    return part.described()
