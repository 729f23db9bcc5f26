"""The index of a directory, and which of its checkpoints is used when a run is continued by itself."""

import os
import pathlib
import warnings
from typing import Any

import pytest
import torch

from raylit.checkpoint import files, format, index
from raylit.checkpoint.index import Entry, Index
from raylit.errors import CheckpointError
from raylit.protocol.messages import Saved

UNSAFE_TORCH = "torch .* can be made to run code"
"""On torch 2.9 each read of a checkpoint warns of that."""


def written(directory: Any, name: str, *, step: int, is_whole: bool = True, is_listed: bool = True) -> None:
    state: dict[str, Any] = {"global_step": step, "state_dict": {"w": torch.full((10_000,), float(step))}}
    part = Saved(rank=0, checkpoint={**state, **({"optimizer_states": []} if is_whole else {})}, of_rank={})
    files.write(format.merge([part], {}), f"{directory}/{name}")
    if is_listed:
        before = index.read_index(directory)
        entry = Entry(name=name, step=step, is_weights_only=not is_whole)
        index.write_index(before.replace_entries(added=[entry], removed=[], last=name, best=""), directory)


def newest(directory: Any) -> str:
    found = index.find_newest_usable(directory)
    assert found is not None
    path, checkpoint = found
    assert torch.equal(checkpoint["state_dict"]["w"], torch.full((10_000,), float(checkpoint["global_step"])))
    return os.path.basename(path)


def age(path: pathlib.Path, *, by_s: float) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - by_s))


def test_the_order_of_writing_counts_even_if_a_copy_changed_the_times(tmp_path: pathlib.Path) -> None:
    for step in (3, 1, 2):
        written(tmp_path, f"{step}.ckpt", step=step)
    age(tmp_path / "2.ckpt", by_s=100)
    assert newest(tmp_path) == "2.ckpt"
    (tmp_path / "2.ckpt").unlink()
    assert newest(tmp_path) == "1.ckpt"


def test_a_file_that_a_crash_left_out_of_the_index_is_found(tmp_path: pathlib.Path) -> None:
    written(tmp_path, "1.ckpt", step=1)
    age(tmp_path / "1.ckpt", by_s=100)
    written(tmp_path, "2.ckpt", step=2, is_listed=False)
    assert newest(tmp_path) == "2.ckpt"
    age(tmp_path / "2.ckpt", by_s=1000)
    assert newest(tmp_path) == "1.ckpt"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"entries": [1]}', '{"entries": [{"name": 1, "other": 2}]}'])
def test_an_unreadable_index_counts_as_empty(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / index.FILE_NAME).write_text(content)
    written(tmp_path, "1.ckpt", step=1, is_listed=False)
    assert newest(tmp_path) == "1.ckpt"


@pytest.mark.parametrize("place", [-1, 0.5, 0.01])
def test_damaged_checkpoints_are_warned_of_and_the_previous_one_is_used(place: float, tmp_path: pathlib.Path) -> None:
    """Cut short by half, or one bit flipped in the middle or near the beginning."""
    for step in (1, 2, 3):
        written(tmp_path, f"{step}.ckpt", step=step)
    for name in ("2.ckpt", "3.ckpt"):
        path = tmp_path / name
        content = bytearray(path.read_bytes())
        if place < 0:
            content = content[: len(content) // 2]
        else:
            content[int(place * len(content))] ^= 1
        path.write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", UNSAFE_TORCH)
        assert newest(tmp_path) == "1.ckpt"
    assert [
        f"{tmp_path}/{name} is damaged" in str(warning.message)
        for name, warning in zip(("3.ckpt", "2.ckpt"), caught, strict=True)
    ] == [True, True]


def test_files_that_are_not_checkpoints_are_skipped_with_a_warning(tmp_path: pathlib.Path) -> None:
    written(tmp_path, "1.ckpt", step=1)
    (tmp_path / "directory.ckpt").mkdir()
    torch.save({"state": 1}, tmp_path / "foreign.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", UNSAFE_TORCH)
        assert newest(tmp_path) == "1.ckpt"
    assert sorted(str(warning.message).split(" is ")[0] for warning in caught) == [
        f"{tmp_path}/directory.ckpt",
        f"{tmp_path}/foreign.ckpt",
    ]


def test_weights_only_checkpoints_are_skipped(tmp_path: pathlib.Path) -> None:
    written(tmp_path, "1.ckpt", step=1)
    written(tmp_path, "2.ckpt", step=2, is_whole=False)
    assert newest(tmp_path) == "1.ckpt"


def test_a_checkpoint_of_a_newer_raylit_is_an_error(tmp_path: pathlib.Path) -> None:
    written(tmp_path, "1.ckpt", step=1)
    checkpoint = files.read(tmp_path / "1.ckpt")
    checkpoint["raylit"]["format"] += 1
    files.write(checkpoint, tmp_path / "2.ckpt")
    with pytest.raises(CheckpointError, match=r"2\.ckpt is of a newer raylit.*upgrade"):
        index.find_newest_usable(tmp_path)


def test_a_file_with_several_names_is_listed_once(tmp_path: pathlib.Path) -> None:
    written(tmp_path, "1.ckpt", step=1)
    files.link(tmp_path / "1.ckpt", tmp_path / "last.ckpt")
    files.duplicate(tmp_path / "1.ckpt", tmp_path / "copy.ckpt")
    files.link(tmp_path / "gone.ckpt", tmp_path / "nowhere.ckpt")
    assert len(list(index.list_newest_first(tmp_path))) == 1


def test_an_empty_directory_has_no_usable_checkpoint(tmp_path: pathlib.Path) -> None:
    assert index.find_newest_usable(tmp_path) is None
    assert index.find_newest_usable(tmp_path / "missing") is None


def test_a_directory_may_be_a_url(tmp_path: pathlib.Path) -> None:
    url = f"memory://{tmp_path}"
    for step in (2, 1):
        written(url, f"{step}.ckpt", step=step)
    assert newest(url) == "1.ckpt"
    files.duplicate(f"{url}/2.ckpt", f"{url}/3.ckpt")
    assert newest(url) == "3.ckpt"


def test_replace_entries_adds_and_removes_names() -> None:
    entries = [Entry(name=name) for name in "abc"]
    before = Index(entries=tuple(entries), last="c", best="a")
    after = before.replace_entries(added=[Entry(name="a", step=1), Entry(name="d")], removed=["b"], last="d", best="a")
    assert [(entry.name, entry.step) for entry in after.entries] == [("c", 0), ("a", 1), ("d", 0)]
    assert (after.last, after.best) == ("d", "a")
