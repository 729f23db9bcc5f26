"""Checkpoints at URLs that fsspec knows. Both sides."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from raylit.checkpoint.image import Image
from raylit.errors import CheckpointError
from raylit.places import file_system, is_object_store


class StoreUnreachable(CheckpointError):
    """Nobody can tell what is at the URL."""

    def __init__(self, url: str, error: Exception) -> None:
        super().__init__(f"cannot look for the checkpoint {url}: {type(error).__name__}: {error}")
        self.url = url


def exists(url: str) -> bool:
    """StoreUnreachable: the store does not say."""
    try:
        files, place = file_system(url)
        return bool(files.exists(place))
    except Exception as error:  # of whatever kind the store's own library raises
        raise StoreUnreachable(url, error) from error


def upload(image: Image, url: str) -> None:
    """By a file in a temporary directory, which is whole before the upload begins."""
    try:
        with collected(url) as copy:
            image.write_to(copy)
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {url}: {error}") from error


def upload_file(copy: Path, url: str) -> None:
    """A whole file; the object at the URL appears with the upload's end. CheckpointError: what was there is still."""
    try:
        files, place = file_system(url)
        if is_object_store(files):
            files.put_file(os.fspath(copy), place)
        else:
            files.makedirs(files._parent(place), exist_ok=True)
            temporary = f"{files._parent(place)}/.{uuid4().hex}.tmp"
            files.put_file(os.fspath(copy), temporary)
            files.mv(temporary, place)
        # One that was there before must not be listed from a cache.
        files.invalidate_cache(files._parent(place))
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot write the checkpoint {url}: {type(error).__name__}: {error}") from error


@contextmanager
def collected(url: str) -> Iterator[Path]:
    """An empty file in a temporary directory, which is uploaded after the block has filled it."""
    with tempfile.TemporaryDirectory(prefix="raylit-") as directory:
        copy = Path(directory) / "checkpoint"
        copy.touch()
        yield copy
        upload_file(copy, url)


@contextmanager
def downloaded(url: str) -> Iterator[Path]:
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
        files.copy(place, file_system(to)[1])
        files.invalidate_cache(files._parent(place))
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot write the checkpoint {to}: {type(error).__name__}: {error}") from error


def remove(url: str) -> None:
    """A missing one is fine."""
    try:
        files, place = file_system(url)
        with suppress(FileNotFoundError):
            files.rm_file(place)
        files.invalidate_cache(files._parent(place))
    except Exception as error:  # of whatever kind the store's own library raises
        raise CheckpointError(f"cannot remove the checkpoint {url}: {type(error).__name__}: {error}") from error
