"""Checkpoint files: whole or not at all, and what is wrong with one is told apart."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raylit.checkpoint import files, format
from raylit.errors import CheckpointError, DamagedCheckpoint
from raylit.protocol.messages import Saved


class Custom:
    """Something that weights_only refuses."""


def a_checkpoint(value: float = 1.0, *, size: int = 1000) -> dict[str, Any]:
    part = Saved(rank=0, checkpoint={"state_dict": {"weight": torch.full((size,), value)}}, of_rank={})
    return format.merge([part], {})


def test_written_checkpoints_are_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory" / "a.ckpt"
    files.write(a_checkpoint(2.0), path)
    assert torch.equal(files.read(path)["state_dict"]["weight"], torch.full((1000,), 2.0))
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["weight"], torch.full((1000,), 2.0))
    assert os.listdir(path.parent) == ["a.ckpt"]


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        files.write(a_checkpoint(), tmp_path / "a.ckpt")
    finally:
        os.umask(previous)
    assert (tmp_path / "a.ckpt").stat().st_mode & 0o777 == 0o640


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    files.write(a_checkpoint(1.0), tmp_path / "target.ckpt")
    (tmp_path / "last.ckpt").symlink_to("target.ckpt")
    files.write(a_checkpoint(2.0), tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert files.read(tmp_path / "target.ckpt")["state_dict"]["weight"][0] == 1.0


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files.write(a_checkpoint(), "~/a.ckpt")
    assert (tmp_path / "a.ckpt").exists()
    files.remove("~/a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


# Writing fails


def _unpicklable(path: Path) -> None:
    files.write({**a_checkpoint(2.0), "hook": lambda: 0}, path)


def _disk_full(path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        files.write(a_checkpoint(2.0, size=1_000_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("fail", [_unpicklable, _disk_full])
def test_a_failed_write_leaves_the_previous_file_and_no_other(fail: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    files.write(a_checkpoint(1.0), path)
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*a\.ckpt"):
        fail(path)
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert files.read(path)["state_dict"]["weight"][0] == 1.0


def test_an_interrupted_write_leaves_no_file(tmp_path: Path) -> None:
    class Interrupting:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write({"state_dict": {}, "x": Interrupting()}, tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["file.txt/a.ckpt", "directory"])
def test_writing_to_an_impossible_path_is_an_error(place: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "directory").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        files.write(a_checkpoint(), tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == ["directory", "file.txt"]


def test_checksums_are_written_even_if_torch_disables_them(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        files.write(a_checkpoint(), tmp_path / "a.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    files.read(tmp_path / "a.ckpt")


def test_a_link_that_replaces_a_draft_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")

    def write() -> None:
        with files.draft_file(tmp_path / "one.ckpt") as draft:
            draft.unlink()
            draft.symlink_to(precious)
            files.fill(lambda file: files.save({"state_dict": {"x": torch.ones(3)}}, file), draft)

    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*one\.ckpt"):
        write()
    assert precious.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["precious.txt"]


def _unserializable(path: Path) -> None:
    files.write({"state_dict": {}, "x": Unserializable()}, path)


@pytest.mark.parametrize(("fail", "reason"), [(_disk_full, "too large"), (_unserializable, "unserializable")])
def test_a_failed_write_reports_its_reason(fail: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    """Not what torch says afterwards about the archive's end, nor an error of the run that is handled meanwhile."""
    try:
        raise ValueError("of the run")
    except ValueError:
        with pytest.raises(CheckpointError, match=f"cannot write .*{reason}"):
            fail(tmp_path / "a.ckpt")


class Unserializable:
    def __reduce__(self) -> Any:
        raise RuntimeError("unserializable")


def test_any_flipped_bit_is_detected_in_a_file_that_torch_wrote(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    state = {"weight": torch.randn(200), "bias": torch.randn(3)}
    files.write({**a_checkpoint(), "state_dict": state}, path)
    data, places = path.read_bytes(), random.Random(0)
    num_found = 0
    for _ in range(150):
        place, bit = places.randrange(len(data)), 1 << places.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            read = files.read(path)["state_dict"]
        except CheckpointError:
            num_found += 1
        else:  # in what pads the file, or what nobody reads: no harm
            assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert num_found > 75


# Killed while writing

_WRITERS = """
import os, sys, torch
from raylit.checkpoint import files, format
from raylit.protocol.messages import Saved

def write_on(number):
    torch.set_num_threads(1)
    while True:
        number += 1
        weights = {"weight": torch.full((5_000_000,), float(number))}
        part = Saved(rank=0, checkpoint={"global_step": number, "state_dict": weights}, of_rank={})
        files.write(format.merge([part], {}), sys.argv[1])
        print("written", number, flush=True)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        write_on(int(line))
    print("pid", pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", 0, flush=True)
"""
"""For each line, a number to start at, a process that writes checkpoints of 20 MB until it is killed."""


def _kill_while_writing(writers: subprocess.Popen[str], *, start: int, delay_s: float) -> int:
    """Return the number of the last checkpoint that was completely written when the writer was killed."""
    assert writers.stdin is not None
    assert writers.stdout is not None
    writers.stdin.write(f"{start}\n")
    writers.stdin.flush()
    seen = dict.fromkeys(("pid", "written"), 0)
    while not all(seen.values()):
        word, number = writers.stdout.readline().split()
        seen[word] = int(number)
    time.sleep(delay_s)
    os.kill(seen["pid"], signal.SIGKILL)
    while "dead" not in seen:
        word, number = writers.stdout.readline().split()
        seen[word] = int(number)
    return seen["written"]


def test_the_file_is_whole_whenever_the_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    delays = random.Random(0)
    number = num_broken_off = 0
    command = [sys.executable, "-c", _WRITERS, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as writers:
        for _ in range(10):
            written = _kill_while_writing(writers, start=number, delay_s=delays.uniform(0, 0.1))
            checkpoint = files.read(path)
            number = checkpoint["global_step"]
            assert number in (written, written + 1)  # renamed, but killed before it could tell
            assert torch.equal(checkpoint["state_dict"]["weight"], torch.full((5_000_000,), float(number)))
            leftovers = list(tmp_path.glob(".*.tmp"))
            num_broken_off += len(leftovers)
            for leftover in leftovers:
                leftover.unlink()
        assert writers.stdin is not None
        writers.stdin.close()
    assert num_broken_off > 0, "no kill fell into a write"


# Reading fails


def test_the_error_for_a_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    for name in ("epoch=0.ckpt", "epoch=1.ckpt", "notes.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(CheckpointError, match=r"no checkpoint .*epoch=2\.ckpt.*: epoch=0\.ckpt, epoch=1\.ckpt$"):
        files.read(tmp_path / "epoch=2.ckpt")
    with pytest.raises(CheckpointError, match="Nor is there a directory"):
        files.read(tmp_path / "nowhere" / "a.ckpt")


def test_a_long_list_of_neighbours_is_truncated(tmp_path: Path) -> None:
    for index in range(15):
        (tmp_path / f"{index:02}.ckpt").write_text("")
    with pytest.raises(CheckpointError, match=r"09\.ckpt and 5 more$"):
        files.read(tmp_path / "a.ckpt")


def test_the_error_for_a_directory_lists_its_files(tmp_path: Path) -> None:
    files.write(a_checkpoint(), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"is a directory.*a\.ckpt"):
        files.read(tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 200, 0.5, -1])
def test_a_truncated_file_is_damaged(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    files.write(a_checkpoint(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"a\.ckpt is damaged"):
        files.read(path)


def test_a_flipped_bit_anywhere_in_the_data_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    files.write(a_checkpoint(), path)
    data = path.read_bytes()
    name, value = data.index(b"weight"), data.index(b"\x00\x00\x80\x3f" * 8) + 2
    record, entry = 37, data.rindex(b"PK\x01\x02")  # the first one's own name, the last one of the archive's directory
    for place, bit in [(name, 4), (value, 4), (record, 128), (entry + 8, 1)]:
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match="is damaged"):
            files.read(path)


def test_a_damaged_class_name_is_not_reported_as_a_pickled_object(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    files.write(a_checkpoint(), path)
    data = path.read_bytes()
    assert b"_rebuild_tensor_v2" in data
    path.write_bytes(data.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_w2"))
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        files.read(path)
    assert "trust" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "contents"),
    [({"weight": torch.ones(1)}, r"the keys \['weight'\]"), (torch.ones(1), "an object of type Tensor")],
)
def test_a_file_without_a_state_dict_is_not_a_checkpoint(value: Any, contents: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=f"not a checkpoint: it holds {contents}"):
        files.read(tmp_path / "a.ckpt")


def test_files_of_other_kinds_are_not_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        files.read(tmp_path / "a.ckpt")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
def test_pickled_objects_need_allow_pickle(is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "odd": Custom()}, path, _use_new_zipfile_serialization=is_zip)
    named = r"test_files\.Custom" if is_zip else "old format"
    with pytest.raises(CheckpointError, match=rf"pickled objects .*{named}.*trust.*weights_only=False"):
        files.read(path)
    assert isinstance(files.read(path, allow_pickle=True)["odd"], Custom)


def test_the_error_names_an_object_whose_class_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {}, "odd": Custom()}, path)
    kept = Custom
    del globals()["Custom"]
    try:
        with pytest.raises(CheckpointError, match=r"not importable here.*Custom"):
            files.read(path, allow_pickle=True)
    finally:
        globals()["Custom"] = kept


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    checkpoint = a_checkpoint()
    checkpoint["raylit"]["format"] = format.FORMAT + 1
    checkpoint["raylit_version"] = "9.9"
    files.write(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"raylit 9\.9 in format 2.*up to format 1.*upgrade"):
        files.read(tmp_path / "a.ckpt")


@pytest.mark.parametrize("has_checksums", [True, False])
def test_lightnings_checkpoints_are_read(has_checksums: bool, tmp_path: Path) -> None:
    checkpoint = {
        "epoch": 1,
        "global_step": 8,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {"weight": torch.ones(2)},
        "hyper_parameters": {"lr": 0.1},
    }
    torch.serialization.set_crc32_options(has_checksums)
    try:
        torch.save(checkpoint, tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert files.read(tmp_path / "a.ckpt")["hyper_parameters"] == {"lr": 0.1}


# Removing


def test_remove_deletes_files_and_links_and_ignores_missing_ones(tmp_path: Path) -> None:
    files.write(a_checkpoint(), tmp_path / "a.ckpt")
    (tmp_path / "last.ckpt").symlink_to("a.ckpt")
    files.remove(tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]
    files.remove(tmp_path / "a.ckpt")
    files.remove(tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == []


def test_removing_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot remove"):
        files.remove(tmp_path)


# Links


def test_a_link_replaces_a_file_or_link(tmp_path: Path) -> None:
    files.write(a_checkpoint(1.0), tmp_path / "one.ckpt")
    files.write(a_checkpoint(2.0), tmp_path / "two.ckpt")
    files.write(a_checkpoint(3.0), tmp_path / "last.ckpt")
    for name, value in (("one.ckpt", 1.0), ("two.ckpt", 2.0)):
        assert files.link(tmp_path / name, tmp_path / "last.ckpt")
        assert os.readlink(tmp_path / "last.ckpt") == name
        assert files.read(tmp_path / "last.ckpt")["state_dict"]["weight"][0] == value
    assert len(os.listdir(tmp_path)) == 3


def test_a_failed_link_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    assert not files.link(tmp_path / "one.ckpt", tmp_path / "last.ckpt")
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_dangling_link_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    assert not files.exists(tmp_path / "last.ckpt")
    files.write(a_checkpoint(), tmp_path / "gone.ckpt")
    assert files.exists(tmp_path / "last.ckpt")


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_url_has_the_whole_new_checkpoint_or_the_previous_one(scheme, tmp_path, monkeypatch):
    import fsspec

    url = f"{scheme}://{tmp_path}/runs/model.ckpt"
    files.write({"state_dict": {"w": torch.zeros(3)}}, url)
    assert files.exists(url)
    store, _ = fsspec.url_to_fs(url)

    def breaks(local, place, **options):
        raise ConnectionError("gone")

    monkeypatch.setattr(type(store), "put_file", lambda self, *args, **options: breaks(*args, **options))
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*model.ckpt: ConnectionError: gone"):
        files.write({"state_dict": {"w": torch.ones(3)}}, url)
    assert torch.equal(files.read(url)["state_dict"]["w"], torch.zeros(3))
    files.remove(url)
    files.remove(url)
    assert not files.exists(url)
    assert not files.link(url, f"{url}.link")


@pytest.mark.parametrize("version", ["2.9.0", "2.9.1+cpu", "1.13.1"])
def test_an_unsafe_torch_version_is_warned_of(version: str) -> None:
    with pytest.warns(UserWarning, match=r"CVE-2026-24747.*upgrade to torch 2\.10"):
        files.warn_of_unsafe_torch(version)


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "2.10.0a0+git123", "3.0.0"])
@pytest.mark.filterwarnings("error")
def test_a_safe_torch_version_is_not_warned_of(version: str) -> None:
    files.warn_of_unsafe_torch(version)


def test_links_at_a_checkpoints_path_are_replaced_and_removed_but_not_followed(tmp_path: Path) -> None:
    precious, path = tmp_path / "precious.txt", tmp_path / "one.ckpt"
    precious.write_text("precious")
    path.symlink_to(precious)
    files.write({"state_dict": {}}, path)
    assert not path.is_symlink()
    path.unlink()
    path.symlink_to(precious)
    files.remove(path)
    assert precious.read_text() == "precious"
    assert os.listdir(tmp_path) == ["precious.txt"]


def test_a_pipe_is_not_a_checkpoint_and_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    with pytest.raises(files.NotACheckpoint, match=r"pipe\.ckpt is a pipe"):
        files.read(tmp_path / "pipe.ckpt")
    (tmp_path / "one.ckpt").mkdir()
    os.mkfifo(tmp_path / "one.ckpt" / ".metadata")
    index = {"format": 1, "progress": {}, "parts": {".metadata": (3, 4)}}
    torch.save({"state_dict": {}, "raylit": index}, tmp_path / "one.ckpt" / "index.ckpt")
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata is no file"):
        files.read(tmp_path / "one.ckpt")
