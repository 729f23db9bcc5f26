"""Names in the metadata of torch.distributed.checkpoint. Driver and worker.

Written against torch 2.13, tested with torch 2.9.1 too. Imported only where there is sharded state, as the import of
torch's modules takes a while.
"""

from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo

METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        # BytesStorageMetadata is left out: torch's planner would unpickle such a part; it reads tensors with
        # weights_only.
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}
"""Names in a pickled `Metadata` that has only tensors, by module; dtypes are not among them."""

__all__ = ["METADATA_CLASSES", "StorageInfo"]
