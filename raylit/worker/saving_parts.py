"""A checkpoint in parts that the workers write by themselves, from a hook. Worker."""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raylit.checkpoint import files
from raylit.checkpoint.checksums import METADATA, name_of_part
from raylit.checkpoint.held import HeldCheckpoint
from raylit.checkpoint.held_part import HeldPart
from raylit.errors import CheckpointError
from raylit.messages import Part
from raylit.places import is_url, joined
from raylit.worker.context import WorkerContext
from raylit.worker.peers import Peers


def write_in_parts(
    path: Any, held: HeldCheckpoint | None, tensors: Mapping[str, Tensor], *, context: WorkerContext, peers: Peers
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
        [(place, error), *_] = peers.gather_objects(("" if draft is None else draft.place, error))
        written = Part(rank=context.rank, num_bytes=0, crc=0, chunks=())
        if not error:
            try:
                written = _written(place, tensors, context=context)
            except CheckpointError as raised:
                error = str(raised)
        ranked = peers.gather_objects((written, error))
        errors = [one for _, one in ranked if one]
        if held is not None and draft is not None and not errors:
            try:
                metadata = held.add_parts([part for part, _ in ranked], subdirectory=draft.subdirectory)
                files.write_bytes(metadata, joined(draft.place, METADATA))
                held.write(draft.index)
                draft.publish()
            except CheckpointError as raised:
                errors = [str(raised)]
        [errors, *_] = peers.gather_objects(errors)
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
    part = HeldPart(tensors, rank=context.rank)
    part.write(joined(place, name_of_part(context.rank)))
    return part.described()
