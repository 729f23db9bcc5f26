"""Metadata and reader of sharded checkpoints in torch.distributed.checkpoint's (DCP's) file format.

Each rank writes one part. Used in the driver and in the workers. Imported only where there are parts, because importing
torch.distributed.checkpoint takes about 1 s.
"""

import io
import pickle
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from raylit.checkpoint import remote
from raylit.checkpoint.layout import METADATA, Checksums, find_damage, name_of_part
from raylit.compat.torch_fsdp import METADATA_CLASSES, build_storage_info
from raylit.errors import CheckpointError, DamagedCheckpoint
from raylit.protocol.messages import Part
from raylit.storage import is_url, join


def build_metadata(parts: Sequence[Part]) -> bytes:
    """Return the content of METADATA, in which torch.distributed.checkpoint looks up the position of each tensor."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, object] = {}
    for part in sorted(parts, key=lambda part: part.rank):
        for chunk in part.chunks:
            properties, shape = TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape)
            tensor = tensors.setdefault(chunk.name, TensorStorageMetadata(properties, shape, []))
            index = MetadataIndex(chunk.name, chunk.offsets, len(tensor.chunks))
            places[index] = build_storage_info(name_of_part(part.rank), offset=chunk.start, length=chunk.num_bytes)
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
    metadata = Metadata(
        state_dict_metadata=dict(tensors),
        planner_data={name: (name,) for name in tensors},
        storage_data=places,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    return pickle.dumps(metadata)


class PartReader:
    """Reader of parts from a directory, at a path or a URL, written by any number of ranks.

    At a URL each file that is needed is downloaded and checked, one at a time. The last one is kept for the next call,
    as it often contains everything that a rank needs.
    """

    def __init__(self, place: str, checksums: Checksums) -> None:
        """Open the directory `place`; `checksums` are those of its files, by their paths relative to `place`."""
        self._place = place
        metadata_files = [name for name in checksums if name.rpartition("/")[2] == METADATA]
        if len(metadata_files) != 1:
            raise DamagedCheckpoint(
                f"{place} is damaged: its index has {len(metadata_files)} files {METADATA}, not one. Use another "
                "checkpoint"
            )
        parent = metadata_files[0].rpartition("/")[0]
        names = {name.rpartition("/")[2]: checksum for name, checksum in checksums.items()}
        if is_url(place):
            self._reader: _SafeReader = _RemoteReader(join(place, parent), names)
        else:
            self._reader = _SafeReader(Path(place) / parent, names)

    def __call__(self, targets: Mapping[str, Tensor]) -> None:
        """Fill the targets in place: plain tensors with the whole tensor, sharded tensors with this rank's shard.

        Raises:
            CheckpointError: if that is not possible.
            DamagedCheckpoint: if a downloaded file differs from what was written.
        """
        if not targets:
            return
        # The steps of torch's own `load`, without its communication between ranks and its wrapping of errors.
        planner = _TensorPlanner()
        try:
            metadata = self._reader.read_metadata()
            planner.set_up_planner(dict(targets), metadata, is_coordinator=True)
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            self._reader.read_data(planner.create_local_plan(), planner)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"cannot read the parts of the checkpoint {self._place}: {error}") from error


class _TensorPlanner(dcp.DefaultLoadPlanner):
    """Load planner for tensors only; torch's own planner would unpickle anything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"the checkpoint's {METADATA} has {read_item.dest_index.fqn} for an object, not a tensor")


class _SafeReader(dcp.FileSystemReader):
    """File reader that unpickles no foreign classes.

    torch reads the parts with weights_only; the metadata, which is a pickle, may only contain its own classes.
    """

    def __init__(self, directory: Path, checksums: Checksums) -> None:
        """Read from `directory`; `checksums` are those of its files, by their names. It contains no other files."""
        super().__init__(directory)
        self._checksums = checksums

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata: Metadata = _MetadataUnpickler(io.BytesIO(self._metadata())).load()
        self._check_names(metadata)
        if getattr(metadata, "storage_meta", None) is not None:
            assert metadata.storage_meta is not None
            metadata.storage_meta.load_id = self.load_id
        return metadata

    def _check_names(self, metadata: Metadata) -> None:
        places = (metadata.storage_data or {}).values()
        for name in {place.relative_path for place in places}:
            if name not in self._checksums:
                raise DamagedCheckpoint(
                    f"{self.path} is damaged: its {METADATA} names {name!r}, which is none of the checkpoint's parts. "
                    "Use another checkpoint"
                )

    def _metadata(self) -> bytes:
        return (Path(self.path) / METADATA).read_bytes()


class _RemoteReader(_SafeReader):
    """Reader for a URL, which copies one file at a time to a temporary directory."""

    def __init__(self, url: str, checksums: Checksums) -> None:
        super().__init__(Path(), checksums)
        self._url = url
        self._copies = ExitStack()
        """Owns the current copy."""
        weakref.finalize(self, self._copies.close)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            self._fetch(name)
            super().read_data(replace(plan, items=items), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _metadata(self) -> bytes:
        with remote.download(join(self._url, METADATA)) as copy:
            self._check(copy)
            return copy.read_bytes()

    def _fetch(self, name: str) -> None:
        if (Path(self.path) / name).exists():
            return
        self._copies.close()
        copy = self._copies.enter_context(remote.download(join(self._url, name)))
        self._check(copy)
        self.path = copy.parent

    def _check(self, copy: Path) -> None:
        if wrong := find_damage(str(copy), self._checksums[copy.name]):
            self._copies.close()
            raise DamagedCheckpoint(f"{self._url} is damaged: {copy.name} {wrong}. Use the checkpoint before it")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"the checkpoint's {METADATA} names {module}.{name}, which does not belong there: it is damaged, or "
            "somebody has changed it to run code"
        )
