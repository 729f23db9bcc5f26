"""Checkpoints in parts, of one rank in this process: their files, on disks and at URLs."""

import copy
import os
import pickle
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import process_group_of_one
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from raylit.accelerators import CPUAccelerator
from raylit.checkpoint import files, format, remote
from raylit.checkpoint import sharded as directory
from raylit.checkpoint.index import find_newest_usable, list_newest_first
from raylit.checkpoint.layout import INDEX, METADATA
from raylit.checkpoint.pending import HostCopy, PendingCheckpoint, PendingPart
from raylit.errors import CheckpointError, DamagedCheckpoint
from raylit.protocol.messages import Saved
from raylit.protocol.state import Progress
from raylit.storage import file_system, is_url, join, list_names, make_directory, read_text, write_bytes
from raylit.strategies.sharded_state import split_parts
from raylit.worker.collectives import Collectives
from raylit.worker.job import WorkerContext
from raylit.worker.state_capture import write_in_parts

SHAPES = {"small": (3,), "empty": (0, 2), "large": (600, 500), "odd": (7, 3)}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with process_group_of_one():
        yield init_device_mesh("cpu", (1,))


@pytest.fixture(params=["disk", "memory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    places = {"disk": str(tmp_path / "a"), "file": f"file://{tmp_path}/a", "memory": f"memory://{tmp_path.name}"}
    return places[request.param]


def sharded(mesh: DeviceMesh, *, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    whole = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in whole.items()}


def write(path: str, state_dict: dict[str, Any], *, step: int = 1) -> None:
    parts: dict[str, Tensor] = {}
    checkpoint = format.checkpoint_from_weights(
        split_parts(state_dict, "state_dict", parts), Progress(global_step=step), module=None, datamodule=None
    )
    saved = Saved(rank=0, checkpoint={**checkpoint, "optimizer_states": []}, of_rank={})
    pending = PendingCheckpoint(format.merge([saved], {}), on_release=lambda: None)
    write_in_parts(path, pending, parts, context=WorkerContext(), collectives=Collectives(rank=0, world_size=1))


def assert_holds(path: str, state_dict: dict[str, DTensor]) -> None:
    read = files.read(path)["state_dict"]
    assert list(read) == list(state_dict)
    for name, tensor in state_dict.items():
        assert torch.equal(read[name], tensor.full_tensor()), name


def test_a_checkpoint_written_in_parts_is_read_back_equal(mesh: DeviceMesh, place: str) -> None:
    state_dict = sharded(mesh, seed=1)
    write(join(place, "one.ckpt"), state_dict)
    assert_holds(join(place, "one.ckpt"), state_dict)
    assert all(tensor.is_meta for tensor in files.read(join(place, "one.ckpt"), is_whole=False)["state_dict"].values())


def test_a_directory_replaces_another_completely(mesh: DeviceMesh, place: str) -> None:
    path = join(place, "one.ckpt")
    for seed in (1, 2):
        write(path, sharded(mesh, seed=seed))
    assert_holds(path, sharded(mesh, seed=2))
    assert list_names(place) == ["one.ckpt"]
    assert len([name for name in list_names(path) if name != INDEX]) in (1, 2)


def test_a_duplicate_stays_when_the_original_is_removed(mesh: DeviceMesh, place: str) -> None:
    first, last = join(place, "one.ckpt"), join(place, "last.ckpt")
    for seed in (1, 2):
        write(first, sharded(mesh, seed=seed))
        files.duplicate(first, last)
    files.remove(first)
    assert list_names(place) == ["last.ckpt"]
    assert not files.exists(first)
    assert_holds(last, sharded(mesh, seed=2))


def test_an_incomplete_directory_is_not_a_checkpoint(mesh: DeviceMesh, place: str) -> None:
    write(join(place, "one.ckpt"), sharded(mesh, seed=1))
    draft = files.directory_draft(join(place, "two.ckpt"))
    again = files.directory_draft(join(place, "one.ckpt"))
    for one in (draft, again):
        files.write_bytes(b"half", join(one.place, "__0_0.distcp"))
    assert list(list_newest_first(place)) == [join(place, "one.ckpt")]
    assert not files.exists(join(place, "two.ckpt"))
    assert_holds(join(place, "one.ckpt"), sharded(mesh, seed=1))
    for one in (draft, again):
        one.discard()
    assert_holds(join(place, "one.ckpt"), sharded(mesh, seed=1))


def test_damage_is_warned_of_and_the_previous_checkpoint_is_used(mesh: DeviceMesh, place: str) -> None:
    for step in (1, 2):
        write(join(place, f"step={step}.ckpt"), sharded(mesh, seed=step), step=step)
    path = join(place, "step=2.ckpt")
    [part] = [name for name in directory.read_checksums(files.read(path, is_whole=False)) if name.endswith(".distcp")]
    store, at = file_system(join(path, part))
    content = bytearray(store.cat_file(at))
    content[len(content) // 2] ^= 1
    store.pipe_file(at, bytes(content))
    with pytest.raises(DamagedCheckpoint, match=r"step=2.ckpt.* is damaged: __0_0.distcp does not match"):
        files.read(path)
    with pytest.warns(UserWarning, match=r"step=2.ckpt is damaged: __0_0.distcp"):
        found = find_newest_usable(place, is_whole=False)
    assert found is not None
    assert found[1]["global_step"] == 1


def test_torch_distributed_checkpoint_reads_the_parts(mesh: DeviceMesh, tmp_path: Path) -> None:
    state_dict = sharded(mesh, seed=1)
    write(str(tmp_path / "one.ckpt"), state_dict)
    dcp_to_torch_save(tmp_path / "one.ckpt", tmp_path / "one.pt")
    read = torch.load(tmp_path / "one.pt")
    for name in ("small", "large", "odd"):
        assert torch.equal(read[f"state_dict.{name}"], state_dict[name].full_tensor())


def test_a_copied_part_is_the_same_file_and_does_not_change(mesh: DeviceMesh) -> None:
    tensors = sharded(mesh, seed=1)
    strided = torch.arange(12.0).reshape(3, 4)[:, :2]
    tensors["view"] = DTensor.from_local(strided, mesh, [Shard(0)])
    by_reference = PendingPart(copy.deepcopy(tensors), rank=0)
    copied = PendingPart(tensors, rank=0, copy_tensors=HostCopy(CPUAccelerator()).copy_state)
    for tensor in tensors.values():
        tensor.to_local().zero_()
    pieces = []
    for part in (copied, by_reference):
        part.begin_pieces()
        pieces.append(part.next_piece().tobytes())
        assert len(part.next_piece()) == 0
    assert pieces[0] == pieces[1]
    assert copied.describe() == by_reference.describe()
    assert copied.describe().num_bytes == len(pieces[0])
    assert copied.describe().crc == zlib.crc32(pieces[0])
    assert copied.describe().num_bytes < 1.1 * sum(4 * tensor.numel() for tensor in tensors.values()) + 2**14


def test_a_directory_at_a_url_is_replaced_by_one_file_and_back(mesh: DeviceMesh) -> None:
    path = "memory://both/one.ckpt"
    write(path, sharded(mesh, seed=1))
    files.remove(path)
    files.write({"state_dict": {}}, path)
    assert remote.find_kind(path) == "file"
    assert files.read(path) == {"state_dict": {}}
    files.remove(path)
    assert not files.exists(path)


def test_all_ranks_raise_if_the_directory_cannot_be_created(mesh: DeviceMesh, tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*one.ckpt"):
        write(str(tmp_path / "file.txt" / "one.ckpt"), sharded(mesh, seed=1))


class Hostile:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def changed_metadata(path: Path, change: Callable[[Metadata], None]) -> None:
    """Rewrite the metadata as an attacker would, with a checksum in the index that fits."""
    file = path / METADATA
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))
    for name in os.listdir(path):
        if name != INDEX:
            rewrite_index(path, lambda about, name=name: about["parts"].update({name: checksum_of(path / name)}))


def checksum_of(file: Path) -> tuple[int, int]:
    content = file.read_bytes()
    return len(content), zlib.crc32(content)


def rewrite_index(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = torch.load(path / INDEX, weights_only=True)
    change(index["raylit"])
    torch.save(index, path / INDEX)


def test_no_part_of_a_sharded_checkpoint_is_unpickled(mesh: DeviceMesh, tmp_path: Path) -> None:
    path, mark = tmp_path / "one.ckpt", tmp_path / "mark"
    write(str(path), sharded(mesh, seed=1))
    torch.save(Hostile(mark), path / "__0_0.distcp")
    num_bytes = (path / "__0_0.distcp").stat().st_size

    def hide_an_object_among_the_tensors(metadata: Metadata) -> None:
        assert metadata.storage_data is not None
        metadata.state_dict_metadata["state_dict.small"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex("state_dict.small")] = _StorageInfo("__0_0.distcp", 0, num_bytes)

    changed_metadata(path, hide_an_object_among_the_tensors)
    with pytest.raises(CheckpointError, match=r"\.metadata .*BytesStorageMetadata"):
        files.read(path)
    assert not mark.exists()
    (path / METADATA).write_bytes(pickle.dumps(Hostile(mark)))
    rewrite_index(path, lambda about: about["parts"].update({METADATA: checksum_of(path / METADATA)}))
    with pytest.raises(CheckpointError, match=r"\.metadata names posix\.system"):
        files.read(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../two.ckpt/__0_0.distcp", "{two}/__0_0.distcp", "file://{two}/__0_0.distcp"])
def test_parts_outside_of_the_checkpoint_are_not_read(mesh: DeviceMesh, tmp_path: Path, name: str) -> None:
    path, two = tmp_path / "one.ckpt", tmp_path / "two.ckpt"
    for number, seed in ((path, 1), (two, 2)):
        write(str(number), sharded(mesh, seed=seed))
    outside = name.format(two=two)

    def lead_outside(metadata: Metadata) -> None:
        assert metadata.storage_data is not None
        for place in metadata.storage_data.values():
            place.relative_path = outside

    changed_metadata(path, lead_outside)
    with pytest.raises(DamagedCheckpoint, match="which is none of the checkpoint's parts"):
        files.read(path)
    rewrite_index(path, lambda about: about["parts"].update({outside: checksum_of(two / "__0_0.distcp")}))
    for is_whole in (True, False):
        with pytest.raises(DamagedCheckpoint, match=r"one.ckpt .*names a part .*outside"):
            files.read(path, is_whole=is_whole)


def test_a_single_file_cannot_name_a_directory_of_parts(mesh: DeviceMesh, tmp_path: Path) -> None:
    write(str(tmp_path / "one.ckpt"), sharded(mesh, seed=1))
    stolen = torch.load(tmp_path / "one.ckpt" / INDEX, weights_only=True)
    stolen["raylit"]["directory"] = str(tmp_path / "one.ckpt")
    torch.save(stolen, tmp_path / "alone.ckpt")
    assert directory.place_of(files.read(tmp_path / "alone.ckpt", is_whole=False)) is None


def test_a_sharded_checkpoint_does_not_replace_a_directory_with_other_content(mesh: DeviceMesh, place: str) -> None:
    file = join(place, "models", "notes.txt")
    make_directory(join(place, "models"))
    write_bytes(b"precious", file) if is_url(file) else Path(file).write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=r"models: .* is no checkpoint"):
        write(join(place, "models"), sharded(mesh, seed=1))
    assert read_text(file) == "precious"
    assert list_names(join(place, "models")) == ["notes.txt"]


def test_foreign_files_in_a_sharded_checkpoint_at_a_url_are_kept(mesh: DeviceMesh) -> None:
    path = "memory://mixed/one.ckpt"
    write(path, sharded(mesh, seed=1))
    write_bytes(b"precious", f"{path}/notes.txt")
    write(path, sharded(mesh, seed=2))
    assert read_text(f"{path}/notes.txt") == "precious"
    assert_holds(path, sharded(mesh, seed=2))
    assert len(list_names(path)) == 3
