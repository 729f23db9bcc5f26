"""File operations on local paths and URLs that fsspec knows, with one set of functions. Driver and workers."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from raylit.errors import ConfigError

_OBJECT_STORES = frozenset({"s3", "gs", "abfs", "oci", "memory"})
"""fsspec's names of the object stores."""

_LOCAL_URL = "file://"


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether the path is a URL."""
    return "://" in os.fspath(path)


def join(directory: str | os.PathLike[str], *parts: str) -> str:
    """Join a directory, local or a URL, and the parts of a path in it."""
    text = os.fspath(directory)
    return "/".join([text.rstrip("/"), *parts]) if is_url(text) else os.path.join(text, *parts)


def absolute(path: str | os.PathLike[str]) -> str:
    """Return a local path with its links resolved; a URL unchanged."""
    text = os.fspath(path)
    return text.rstrip("/") if is_url(text) else os.path.realpath(os.path.expanduser(text))


def is_inside(path: str, directory: str) -> bool:
    """Return whether the path is in or below the directory, with `..` and links resolved.

    A link as the last part of the path is not followed.
    """
    if path.startswith(_LOCAL_URL) and directory.startswith(_LOCAL_URL):
        return is_inside(path.removeprefix(_LOCAL_URL), directory.removeprefix(_LOCAL_URL))
    if is_url(path) or is_url(directory):
        start = directory.rstrip("/") + "/"
        return path.startswith(start) and leads_down(path.removeprefix(start))
    return Path(os.path.realpath(directory)) in Path(_resolve_parent(path)).parents


def relative(path: str, directory: str) -> str:
    """Return the path relative to the directory, if it is inside; else the path unchanged."""
    if not is_inside(path, directory):
        return path
    if is_url(path):
        return path.removeprefix(directory.rstrip("/") + "/")
    return os.path.relpath(_resolve_parent(path), os.path.realpath(directory))


def check_stays_below(name: str, what: str) -> None:
    """Check that the name, joined to a directory, stays below it.

    Raises:
        ConfigError: if it does not; `what` is its name in the message.
    """
    if os.path.isabs(name) or "://" in name or os.pardir in name.replace("\\", "/").split("/"):
        raise ConfigError(
            f"{what} leads out of the directory that it belongs to: it must be a name, or a path below that directory "
            "without '..'. For another place give another directory"
        )


def leads_down(name: object) -> bool:
    """Return whether this is a relative path without `..` that is no URL, so that it stays below any directory."""
    return (
        isinstance(name, str)
        and "://" not in name
        and "::" not in name  # fsspec chains URLs with it
        and not os.path.isabs(name)
        and all(part not in ("", os.curdir, os.pardir) for part in name.replace("\\", "/").split("/"))
    )


def list_names(directory: str) -> list[str]:
    """Return the names in a directory; an empty list if it does not exist."""
    if is_url(directory):
        files, path = file_system(directory)
        files.invalidate_cache(path)
        return [
            name.rstrip("/").rsplit("/", 1)[-1] for name in (files.ls(path, detail=False) if files.exists(path) else ())
        ]
    return os.listdir(directory) if os.path.isdir(directory) else []


def exists(path: str) -> bool:
    """Return whether there is a file or directory."""
    if is_url(path):
        files, place = file_system(path)
        files.invalidate_cache()
        return bool(files.exists(place))
    return os.path.exists(path)


def modified_at(path: str) -> float:
    """Return when a file was last written, in seconds since 1970; 0.0 if there is none."""
    try:
        if is_url(path):
            files, place = file_system(path)
            return float(files.modified(place).timestamp())
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def make_directory(path: str) -> None:
    """Create a directory with its parents; object stores need none."""
    if not is_url(path):
        os.makedirs(path, exist_ok=True)
        return
    files, place = file_system(path)
    if not is_object_store(files):
        files.makedirs(place, exist_ok=True)


def read_text(path: str) -> str | None:
    """Return a file's text; None if there is no such file."""
    try:
        if is_url(path):
            files, place = file_system(path)
            return str(files.cat_file(place).decode())
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None


def write_text(text: str, path: str) -> None:
    """Write a file as a whole or not at all, with its directory."""
    if is_url(path):
        write_bytes(text.encode(), path)
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    replace_file(text.encode(), path)


def replace_file(content: bytes, path: str) -> None:
    """Write a small local file as a whole or not at all, in an existing directory."""
    directory, name = os.path.split(path)
    # The name is unpredictable, so no link can be put there beforehand, and mode "x" follows none.
    temporary = os.path.join(directory, f".{name}.{uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def write_bytes(content: bytes, url: str) -> None:
    """Write an object or file at a URL, with its directory."""
    files, place = file_system(url)
    make_directory(url.rsplit("/", 1)[0])
    files.pipe_file(place, content)


def remove_file(path: str) -> None:
    """Remove a file, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        if is_url(path):
            files, place = file_system(path)
            files.rm_file(place)
        else:
            os.remove(path)


def remove_directory(path: str) -> None:
    """Remove a directory with its content."""
    if is_url(path):
        files, place = file_system(path)
        files.rm(place, recursive=True)
    else:
        shutil.rmtree(path)


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    # Imported here so that importing raylit does not import fsspec.
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    return files, path


def is_object_store(files: Any) -> bool:
    """Return whether this is an object store.

    It has no directories (creating one would create a bucket), and a file appears when its upload is complete.
    """
    protocols = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    return not _OBJECT_STORES.isdisjoint(protocols)


def _resolve_parent(path: str) -> str:
    """Return the path with the links in its parent resolved; the last name is not followed."""
    parent, name = os.path.split(path.rstrip("/"))
    if name in ("", os.curdir, os.pardir):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(parent), name)
