"""Checkpoints at URLs that fsspec knows. Driver and workers."""

import os
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

from raylit.checkpoint.layout import INDEX, PARTS, is_own, is_replaceable
from raylit.errors import CheckpointError
from raylit.storage import file_system, is_object_store, join, list_names, make_directory, modified_at


class StoreUnreachable(CheckpointError):
    """Error raised when the store does not answer whether there is a checkpoint at a URL."""

    def __init__(self, url: str, error: Exception) -> None:
        super().__init__(f"cannot look for the checkpoint {url}: {type(error).__name__}: {error}")
        self.url = url


def exists(url: str) -> bool:
    """Return whether there is a checkpoint at the URL.

    Raises:
        StoreUnreachable: if the store does not answer.
    """
    try:
        return find_kind(url) != ""
    except Exception as error:  # of whatever kind the store's own library raises
        raise StoreUnreachable(url, error) from error


def find_kind(url: str) -> Literal["file", "directory", ""]:
    """Return what kind of checkpoint is at the URL; "" if there is none.

    A directory counts as a checkpoint once its index exists.
    """
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
    """Return whether the checkpoint at the URL is a directory.

    Raises:
        CheckpointError: if the store does not answer.
    """
    try:
        return find_kind(url) == "directory"
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot read the checkpoint {url}: {type(error).__name__}: {error}") from error


def written_at(url: str) -> float:
    """Return when the checkpoint at the URL was written, in seconds since 1970; 0.0 if there is none."""
    kind = find_kind(url)
    return modified_at(join(url, INDEX) if kind == "directory" else url) if kind else 0.0


def upload_file(copy: Path, url: str) -> None:
    """Upload a whole file; the object appears at the URL when the upload ends.

    Raises:
        CheckpointError: if it failed; the previous object is unchanged.
    """
    try:
        files, place = file_system(url)
        if is_object_store(files):
            files.put_file(os.fspath(copy), place)
        else:
            files.makedirs(posixpath.dirname(place), exist_ok=True)
            temporary = f"{posixpath.dirname(place)}/.{uuid4().hex}.tmp"
            files.put_file(os.fspath(copy), temporary)
            files.mv(temporary, place)
        # A cached listing would still show the previous object.
        files.invalidate_cache(posixpath.dirname(place))
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot write the checkpoint {url}: {type(error).__name__}: {error}") from error


@contextmanager
def draft_upload(url: str) -> Iterator[Path]:
    """Yield an empty file in a temporary directory and upload it after the block has filled it."""
    with tempfile.TemporaryDirectory(prefix="raylit-") as directory:
        copy = Path(directory) / "checkpoint"
        copy.touch()
        yield copy
        upload_file(copy, url)


@contextmanager
def download(url: str) -> Iterator[Path]:
    """Yield a copy of the file, under its own name in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="raylit-") as directory:
        copy = Path(directory) / (url.rstrip("/").rsplit("/", 1)[-1] or "checkpoint")
        try:
            files, place = file_system(url)
            files.get_file(place, os.fspath(copy))
        except Exception as error:  # of whatever kind the store's own library raises
            raise CheckpointError(f"cannot read the checkpoint {url}: {type(error).__name__}: {error}") from error
        yield copy


def copy(url: str, to: str) -> None:
    """Copy a checkpoint, inside the store where the store supports it."""
    try:
        files, place = file_system(url)
        if find_kind(url) == "directory":
            _copy_directory(url, to)
        else:
            files.copy(place, file_system(to)[1])
        files.invalidate_cache(posixpath.dirname(place))
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot write the checkpoint {to}: {type(error).__name__}: {error}") from error


def remove(url: str) -> None:
    """Remove the checkpoint at the URL; a missing one is not an error."""
    try:
        files, place = file_system(url)
        with suppress(FileNotFoundError):
            if find_kind(url) == "directory":
                files.rm_file(f"{place}/{INDEX}")  # first: a partly removed directory must not look like a checkpoint
                files.rm(place, recursive=True)
            else:
                files.rm_file(place)
        files.invalidate_cache(posixpath.dirname(place))
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot remove the checkpoint {url}: {type(error).__name__}: {error}") from error


class RemoteDirectoryDraft:
    """New subdirectory for the parts of a checkpoint at a URL.

    Writing the index publishes the parts; until then the previous checkpoint counts.
    """

    def __init__(self, url: str) -> None:
        """Create the subdirectory below `url`.

        Raises:
            CheckpointError: if that is not possible.
        """
        self._url = url.rstrip("/")
        self.subdirectory = f"{PARTS}{uuid4().hex[:12]}"
        self.place = join(self._url, self.subdirectory)
        self.index = join(self._url, INDEX)
        self._is_published = False
        try:
            if not is_replaceable(list_names(self._url)):
                raise FileExistsError(f"{self._url} is a directory and is no checkpoint: give a URL where nothing is")
            make_directory(self.place)
        except Exception as error:  # of whatever kind the store's own library raises
            raise CheckpointError(f"cannot write the checkpoint {url}: {type(error).__name__}: {error}") from error

    def publish(self) -> None:
        """Remove the previous parts; call this after the index has been written."""
        self._is_published = True
        _clear_directory(self._url, keep=(INDEX, self.subdirectory))

    def discard(self) -> None:
        """Remove the draft's files, unless it has been published."""
        if self._is_published:
            return
        files, place = file_system(self.place)
        with suppress(Exception):  # the store itself may be unreachable
            files.invalidate_cache(place)
            files.rm(place, recursive=True)


def _copy_directory(url: str, to: str) -> None:
    """Copy a sharded checkpoint, its index last, so that the previous one counts until the copy is complete."""
    files, place = file_system(url)
    target = file_system(to)[1]
    subdirectories = [name for name in _list_names(url) if name != INDEX]
    for name in subdirectories:
        make_directory(join(to, name))
        for file in _list_names(join(url, name)):
            files.copy(f"{place}/{name}/{file}", f"{target}/{name}/{file}")
    if is_object_store(files):
        files.copy(f"{place}/{INDEX}", f"{target}/{INDEX}")
    else:
        temporary = f"{target}/.{uuid4().hex}.tmp"
        files.copy(f"{place}/{INDEX}", temporary)
        files.mv(temporary, f"{target}/{INDEX}")
    _clear_directory(to, keep=(INDEX, *subdirectories))


def _clear_directory(url: str, *, keep: Sequence[str]) -> None:
    """Remove the previous content of a checkpoint's directory; files that cannot be removed do no harm."""
    files, place = file_system(url)
    with suppress(Exception):
        if is_object_store(files):
            files.rm_file(place)  # a previous checkpoint that was one file of this name
    with suppress(Exception):
        for name in _list_names(url):
            if name not in keep and is_own(name):
                files.rm(f"{place}/{name}", recursive=True)


def _list_names(url: str) -> list[str]:
    files, place = file_system(url)
    files.invalidate_cache(place)
    return [name.rstrip("/").rpartition("/")[2] for name in files.ls(place, detail=False)]
