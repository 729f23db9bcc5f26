"""What a pickled metadata of torch.distributed.checkpoint consists of."""

import pickle
import pickletools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from raylit.compat.torch_checkpoint import METADATA_CLASSES, StorageInfo


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # in torch 2.9 itself
@pytest.mark.usefixtures("process_group")
def test_metadata_of_tensors_names_known_classes_only(tmp_path):
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    assert {type(place) for place in metadata.storage_data.values()} == {StorageInfo}
    pickled = pickle.dumps(Metadata(metadata.state_dict_metadata, storage_data=metadata.storage_data), protocol=2)
    named = {tuple(arg.split(" ")) for code, arg, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    own = {(module, name) for module, name in named if module.startswith("torch")}
    known = {(module, name) for module, names in METADATA_CLASSES.items() for name in names}
    dtypes = {("torch", name) for module, name in own if isinstance(getattr(torch, name, None), torch.dtype)}
    assert own - dtypes <= known
