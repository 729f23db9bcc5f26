"""Where files go: local paths and URLs that fsspec knows, by one set of functions. Driver."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from raylit.errors import ConfigError

_OBJECT_STORES = frozenset({"s3", "gs", "abfs", "oci", "memory"})
"""By fsspec's names."""

_LOCAL_URL = "file://"


def is_url(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def join(directory: str | os.PathLike[str], *parts: str) -> str:
    text = os.fspath(directory)
    return "/".join([text.rstrip("/"), *parts]) if is_url(text) else os.path.join(text, *parts)


def absolute(path: str | os.PathLike[str]) -> str:
    """A local path with its links resolved; a URL as it is."""
    text = os.fspath(path)
    return text.rstrip("/") if is_url(text) else os.path.realpath(os.path.expanduser(text))


def is_inside(path: str, directory: str) -> bool:
    """It lies in the directory or below it, wherever `..` and links lead. A link itself lies where its name does."""
    if path.startswith(_LOCAL_URL) and directory.startswith(_LOCAL_URL):
        return is_inside(path.removeprefix(_LOCAL_URL), directory.removeprefix(_LOCAL_URL))
    if is_url(path) or is_url(directory):
        start = directory.rstrip("/") + "/"
        return path.startswith(start) and leads_down(path.removeprefix(start))
    return Path(os.path.realpath(directory)) in Path(_real_place(path)).parents


def relative(path: str, directory: str) -> str:
    """From the directory on, where the path leads into it."""
    if not is_inside(path, directory):
        return path
    if is_url(path):
        return path.removeprefix(directory.rstrip("/") + "/")
    return os.path.relpath(_real_place(path), os.path.realpath(directory))


def check_stays_below(name: str, what: str) -> None:
    """ConfigError: joined to a directory the name leads out of it. `what`: how the error calls it."""
    if os.path.isabs(name) or "://" in name or os.pardir in name.replace("\\", "/").split("/"):
        raise ConfigError(
            f"{what} leads out of the directory that it belongs to: it must be a name, or a path below that directory "
            "without '..'. For another place give another directory"
        )


def leads_down(name: object) -> bool:
    """It is a path that leads from any directory into it or below it: relative, without `..`, and no URL."""
    return (
        isinstance(name, str)
        and "://" not in name
        and "::" not in name  # joins URLs for fsspec
        and not os.path.isabs(name)
        and all(part not in ("", os.curdir, os.pardir) for part in name.replace("\\", "/").split("/"))
    )


def entries(directory: str) -> list[str]:
    """The names in it; none where it does not exist."""
    if is_url(directory):
        files, path = file_system(directory)
        files.invalidate_cache(path)
        return [
            name.rstrip("/").rsplit("/", 1)[-1] for name in (files.ls(path, detail=False) if files.exists(path) else ())
        ]
    return os.listdir(directory) if os.path.isdir(directory) else []


def exists(path: str) -> bool:
    if is_url(path):
        files, place = file_system(path)
        files.invalidate_cache()
        return bool(files.exists(place))
    return os.path.exists(path)


def modified_at(path: str) -> float:
    """When a file was last written, in seconds since 1970; 0.0 where it is not there."""
    try:
        if is_url(path):
            files, place = file_system(path)
            return float(files.modified(place).timestamp())
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def make_directory(path: str) -> None:
    if not is_url(path):
        os.makedirs(path, exist_ok=True)
        return
    files, place = file_system(path)
    if not is_object_store(files):
        files.makedirs(place, exist_ok=True)


def read_text(path: str) -> str | None:
    """None: there is no such file."""
    try:
        if is_url(path):
            files, place = file_system(path)
            return str(files.cat_file(place).decode())
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return None


def write_text(text: str, path: str) -> None:
    """Whole or not at all; the directory is made as needed."""
    if is_url(path):
        write_bytes(text.encode(), path)
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    replace_file(text.encode(), path)


def replace_file(content: bytes, path: str) -> None:
    """Write a small local file whole or not at all, in a directory that is there."""
    directory, name = os.path.split(path)
    # Nobody can put a link of this name there beforehand, and "x" follows none.
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
    """The directory is made as needed."""
    files, place = file_system(url)
    make_directory(url.rsplit("/", 1)[0])
    files.pipe_file(place, content)


def remove_directory(path: str) -> None:
    """With all that is in it."""
    if is_url(path):
        files, place = file_system(path)
        files.rm(place, recursive=True)
    else:
        shutil.rmtree(path)


def _real_place(path: str) -> str:
    """Where the path's last name lies, with all links before it resolved."""
    parent, name = os.path.split(path.rstrip("/"))
    if name in ("", os.curdir, os.pardir):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(parent), name)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    # With the first URL only: importing raylit should not cost the import of fsspec.
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    return files, path


def is_object_store(files: Any) -> bool:
    """It has no directories (to make one would be to make a bucket), and a file is there once it is complete."""
    protocols = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    return not _OBJECT_STORES.isdisjoint(protocols)
