"""Checkpoints at URLs that fsspec knows. Both sides."""

import os
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

from raylit.checkpoint.sharded import INDEX, PARTS, is_own, is_replaceable
from raylit.errors import CheckpointError
from raylit.storage import entries, file_system, is_object_store, join, make_directory, modified_at


class StoreUnreachable(CheckpointError):
    """Nobody can tell what is at the URL."""

    def __init__(self, url: str, error: Exception) -> None:
        super().__init__(f"cannot look for the checkpoint {url}: {type(error).__name__}: {error}")
        self.url = url


def exists(url: str) -> bool:
    """StoreUnreachable: the store does not say."""
    try:
        return kind_of(url) != ""
    except Exception as error:  # of whatever kind the store's own library raises
        raise StoreUnreachable(url, error) from error


def kind_of(url: str) -> Literal["file", "directory", ""]:
    """What the checkpoint there is; empty: there is none, as a directory counts once its index is there."""
    files, place = file_system(url)
    files.invalidate_cache(posixpath.dirname(place))
    try:
        is_file = files.info(place)["type"] != "directory"
    except FileNotFoundError:
        return ""
    if is_file:
        return "file"
    files.invalidate_cache(place)
    return "directory" if files.exists(f"{place}/{INDEX}") else ""


def has_index(url: str) -> bool:
    """It is a directory. CheckpointError: the store does not say."""
    try:
        return kind_of(url) == "directory"
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot read the checkpoint {url}: {type(error).__name__}: {error}") from error


def written_at(url: str) -> float:
    """When the checkpoint there was, in seconds since 1970; 0.0 where there is none."""
    kind = kind_of(url)
    return modified_at(join(url, INDEX) if kind == "directory" else url) if kind else 0.0


def upload_file(copy: Path, url: str) -> None:
    """A whole file; the object at the URL appears with the upload's end. CheckpointError: what was there is still."""
    try:
        files, place = file_system(url)
        if is_object_store(files):
            files.put_file(os.fspath(copy), place)
        else:
            files.makedirs(posixpath.dirname(place), exist_ok=True)
            temporary = f"{posixpath.dirname(place)}/.{uuid4().hex}.tmp"
            files.put_file(os.fspath(copy), temporary)
            files.mv(temporary, place)
        # One that was there before must not be listed from a cache.
        files.invalidate_cache(posixpath.dirname(place))
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot write the checkpoint {url}: {type(error).__name__}: {error}") from error


@contextmanager
def draft_upload(url: str) -> Iterator[Path]:
    """An empty file in a temporary directory, which is uploaded after the block has filled it."""
    with tempfile.TemporaryDirectory(prefix="raylit-") as directory:
        copy = Path(directory) / "checkpoint"
        copy.touch()
        yield copy
        upload_file(copy, url)


@contextmanager
def download(url: str) -> Iterator[Path]:
    """A copy in a temporary directory, under its own name."""
    with tempfile.TemporaryDirectory(prefix="raylit-") as directory:
        copy = Path(directory) / (url.rstrip("/").rsplit("/", 1)[-1] or "checkpoint")
        try:
            files, place = file_system(url)
            files.get_file(place, os.fspath(copy))
        except Exception as error:  # of whatever kind the store's own library raises
            raise CheckpointError(f"cannot read the checkpoint {url}: {type(error).__name__}: {error}") from error
        yield copy


def copy(url: str, to: str) -> None:
    """Inside the store where it can."""
    try:
        files, place = file_system(url)
        if kind_of(url) == "directory":
            _copy_directory(url, to)
        else:
            files.copy(place, file_system(to)[1])
        files.invalidate_cache(posixpath.dirname(place))
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot write the checkpoint {to}: {type(error).__name__}: {error}") from error


def remove(url: str) -> None:
    """A missing one is fine."""
    try:
        files, place = file_system(url)
        with suppress(FileNotFoundError):
            if kind_of(url) == "directory":
                files.rm_file(f"{place}/{INDEX}")  # first: half a directory must never look like a checkpoint
                files.rm(place, recursive=True)
            else:
                files.rm_file(place)
        files.invalidate_cache(posixpath.dirname(place))
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot remove the checkpoint {url}: {type(error).__name__}: {error}") from error


class RemoteDirectoryDraft:
    """A new subdirectory of one at a URL for the parts of a checkpoint, which its index makes known when it is written;
    until then what was there counts."""

    def __init__(self, url: str) -> None:
        """CheckpointError: it cannot be made."""
        self._url = url.rstrip("/")
        self.subdirectory = f"{PARTS}{uuid4().hex[:12]}"
        self.place = join(self._url, self.subdirectory)
        self.index = join(self._url, INDEX)
        self._is_published = False
        try:
            if not is_replaceable(entries(self._url)):
                raise FileExistsError(f"{self._url} is a directory and is no checkpoint: give a URL where nothing is")
            make_directory(self.place)
        except Exception as error:  # of whatever kind the store's own library raises
            raise CheckpointError(f"cannot write the checkpoint {url}: {type(error).__name__}: {error}") from error

    def publish(self) -> None:
        """The index is there."""
        self._is_published = True
        _clear(self._url, kept=(INDEX, self.subdirectory))

    def discard(self) -> None:
        """What is left of it, unless it is published."""
        if self._is_published:
            return
        files, place = file_system(self.place)
        with suppress(Exception):  # it may be this that cannot be reached
            files.invalidate_cache(place)
            files.rm(place, recursive=True)


def _copy_directory(url: str, to: str) -> None:
    """Its index last, so that until then what was there counts."""
    files, place = file_system(url)
    target = file_system(to)[1]
    subdirectories = [name for name in _names_in(url) if name != INDEX]
    for name in subdirectories:
        make_directory(join(to, name))
        for file in _names_in(join(url, name)):
            files.copy(f"{place}/{name}/{file}", f"{target}/{name}/{file}")
    if is_object_store(files):
        files.copy(f"{place}/{INDEX}", f"{target}/{INDEX}")
    else:
        temporary = f"{target}/.{uuid4().hex}.tmp"
        files.copy(f"{place}/{INDEX}", temporary)
        files.mv(temporary, f"{target}/{INDEX}")
    _clear(to, kept=(INDEX, *subdirectories))


def _clear(url: str, *, kept: Sequence[str]) -> None:
    """Remove what was in a directory's place before; what cannot be removed does no harm."""
    files, place = file_system(url)
    with suppress(Exception):
        if is_object_store(files):
            files.rm_file(place)  # one file of this name
    with suppress(Exception):
        for name in _names_in(url):
            if name not in kept and is_own(name):
                files.rm(f"{place}/{name}", recursive=True)


def _names_in(url: str) -> list[str]:
    files, place = file_system(url)
    files.invalidate_cache(place)
    return [name.rstrip("/").rpartition("/")[2] for name in files.ls(place, detail=False)]
