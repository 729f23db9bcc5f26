"""Files of sharded state: torch.distributed.checkpoint's, each rank's part its own. Both sides.

Imported only where there are any: torch takes a while for it.
"""

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from raylit.errors import CheckpointError, PartsError
from raylit.strategies.parts import Checksums, checksum

_METADATA = ".metadata"
_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath"},
    "collections": {"OrderedDict"},
}
"""All that torch 2.13 pickles there, by module; besides dtypes."""


def write(parts: Mapping[str, Tensor], directory: str, *, rank: int) -> Checksums:
    """Every rank its own file, flushed; returns the checksums of what this rank has written. Collective."""
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    try:
        dcp.save(dict(parts), storage_writer=dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True))
    except Exception as error:  # torch's CheckpointException, with what each rank has met in it
        raise PartsError(f"cannot write the parts of a checkpoint into {directory}: {error}") from error
    own = [f"__{rank}_0.distcp", *([_METADATA] if rank == 0 else [])]
    return {name: checksum(path / name) for name in own if (path / name).exists()}


def read(targets: Mapping[str, Tensor], directory: str) -> None:
    """Into the targets: plain tensors get the whole, sharded ones their share, over however many ranks it is."""
    if not targets:
        return
    try:
        with warnings.catch_warnings():
            # Each rank finds for itself what it needs: that nobody is asked is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(dict(targets), storage_reader=_SafeReader(directory), no_dist=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot read the parts of the checkpoint {directory}: {error}") from error


class _SafeReader(dcp.FileSystemReader):
    """Its parts torch reads with weights_only; the metadata, which is a pickle, with nothing but its own classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / _METADATA
        metadata: Metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if getattr(metadata, "storage_meta", None) is not None:
            assert metadata.storage_meta is not None
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"the checkpoint's {_METADATA} names {module}.{name}, which does not belong there: it is damaged, or "
            "somebody has changed it to run code"
        )
