"""Name what the metadata of torch.distributed.checkpoint consists of. Both sides.

Written against torch 2.13, tested with torch 2.9.1 too. Imported only where there is sharded state:
torch takes a while for it.
"""

from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo

METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        # For BytesStorageMetadata torch's planner would unpickle a part; tensors it reads with weights_only.
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
"""All that a pickled `Metadata` with tensors only names, by module; besides dtypes."""

__all__ = ["METADATA_CLASSES", "StorageInfo"]
