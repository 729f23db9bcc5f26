"""Checkpoint files: written whole or not at all, read with damage told apart from danger. Both sides.

Paths are local, or URLs that fsspec knows; nothing outside this module and `remote` opens a checkpoint.
"""

import os
import pickle
import shutil
import socket
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch

from raylit.checkpoint import format, remote
from raylit.checkpoint import sharded as directory
from raylit.checkpoint.format import FORMAT
from raylit.errors import CheckpointError, DamagedCheckpoint
from raylit.storage import file_system, is_url, join


class NotACheckpoint(CheckpointError):
    """Whole as it may be, it is something else."""


def write(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write to a hidden file in the same directory, flush it to the disk and rename it.

    Directories are made as needed. A symbolic link at `path` is replaced, not followed. At a URL the object appears
    with its upload's end. CheckpointError: what stood at `path` stands there still.
    """
    write_with(lambda file: save(dict(checkpoint), file), path)


def write_with(save_to: Callable[[IO[bytes]], None], path: str | os.PathLike[str]) -> None:
    """Write, in the same way as `write`, what `save_to` writes to the file that it is given. At a URL it is whole in a
    temporary directory before its upload begins."""
    try:
        with remote.draft_upload(os.fspath(path)) if is_url(path) else draft_file(path) as draft:
            fill(save_to, draft)
    except (OSError, RuntimeError, AttributeError, TypeError, pickle.PicklingError) as error:
        raise CheckpointError(f"cannot write the checkpoint {os.fspath(path)}: {error}") from error


def fill(save_to: Callable[[IO[bytes]], None], path: str | os.PathLike[str]) -> None:
    """Have `save_to` write to an existing, empty file, and flush it to the disk. OSError: somebody has put a symbolic
    link in its place, among other reasons."""
    with open(os.open(path, os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)), "wb") as file:
        save_to(file)
        file.flush()
        os.fsync(file.fileno())


def save(value: Any, file: IO[bytes]) -> None:
    """Write a value in torch's format, with its checksums even where torch is set to leave them out."""
    has_checksums, handled = torch.serialization.get_crc32_options(), sys.exc_info()[1]
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(value, file)
    except RuntimeError as error:
        # After an error of the file torch still tries to write the archive's end, and then complains about that.
        first = error.__context__
        raise (error if first is None or first is handled else first) from None
    finally:
        torch.serialization.set_crc32_options(has_checksums)


class DirectoryDraft:
    """A hidden directory beside a path, which it takes the place of when it is published; who fills it flushes its
    files to the disk."""

    subdirectory = ""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """CheckpointError: it cannot be made."""
        self._target = _local(path).absolute()  # workers stand elsewhere
        self.place = str(self._target.parent / _temporary_name())
        self.index = os.path.join(self.place, directory.INDEX)
        try:
            directory.check_replaceable(self._target)
            os.makedirs(self.place)
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint {self._target}: {error}") from error

    def publish(self) -> None:
        """CheckpointError: what stood at the path stands there still."""
        try:
            directory.move_into_place(Path(self.place), self._target)
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint {self._target}: {_reason(error)}") from error

    def discard(self) -> None:
        """What is left of it, and what it has taken the place of."""
        directory.discard(Path(self.place))


def directory_draft(path: str | os.PathLike[str]) -> DirectoryDraft | remote.RemoteDirectoryDraft:
    """For the parts of a checkpoint that is a directory. They go to its `place` and then the checkpoint itself, which
    has them in its `subdirectory`, to its `index`; after that it is published. CheckpointError: it cannot be made."""
    return remote.RemoteDirectoryDraft(os.fspath(path)) if is_url(path) else DirectoryDraft(path)


def write_bytes(content: bytes, path: str) -> None:
    """A small file into a draft."""
    try:
        if is_url(path):
            files, place = file_system(path)
            files.pipe_file(place, content)
            return
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:  # of whatever kind a store's own library raises
        raise CheckpointError(f"cannot write {path}: {type(error).__name__}: {error}") from error


@contextmanager
def draft_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden, empty file, which after the block takes the place of `path`; whoever fills it flushes it to the disk.

    CheckpointError, and whatever the block raises: what stood at `path` stands there still.
    """
    target = _local(path)
    draft = target.parent / _temporary_name()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.touch(exist_ok=False)
            yield draft
            os.replace(draft, target)
        except BaseException:
            with suppress(OSError):  # the error that counts is the first
                draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {target}: {_reason(error)}") from error
    except CheckpointError as error:
        name_target(error, draft=draft, target=target)
        raise
    _sync_directory(target.parent)


def name_target(error: CheckpointError, *, draft: str | Path, target: str | os.PathLike[str]) -> None:
    """Have an error name the path that was asked for in place of the draft that was written to."""
    error.args = (str(error).replace(str(draft), os.fspath(target)),)


def _reason(error: OSError) -> str:
    """Without the paths, which may be those of a draft."""
    return f"[Errno {error.errno}] {error.strerror}" if error.errno is not None and error.strerror else str(error)


def read(path: str | os.PathLike[str], *, allow_pickle: bool = False, is_whole: bool = True) -> dict[str, Any]:
    """The checkpoint, its tensors on the CPU, from a path or a URL that fsspec knows; Lightning's own files too.

    Of a sharded one, which is a directory, `is_whole` reads what workers have written, too; else there are placeholders
    for it.

    `allow_pickle` unpickles any object, which can run code: for trusted files. CheckpointError: no such file, not a
    checkpoint, of a newer format, or pickled without `allow_pickle`; DamagedCheckpoint: not what was written.
    """
    if is_url(path):
        return _read_url(os.fspath(path), allow_pickle, is_whole)
    source = _local(path)
    if directory.is_checkpoint(source):
        index = directory.with_place(_read(source / directory.INDEX, str(source), allow_pickle), source)
        return directory.read_whole(index) if is_whole else index
    if source.is_dir():
        raise NotACheckpoint(f"{source} is a directory, not a checkpoint file.{_nearby(source)}")
    if not source.exists():
        raise CheckpointError(f"there is no checkpoint {source}.{_nearby(source.parent)}")
    if not source.is_file():
        raise NotACheckpoint(f"{source} is a pipe, a socket or a device, not a checkpoint file")
    return _read(source, str(source), allow_pickle)


def check_parts(checkpoint: Mapping[str, Any]) -> None:
    """DamagedCheckpoint: what placeholders stand for is not as it was written. Nothing of it is kept in memory."""
    if (place := directory.place_of(checkpoint)) is not None:
        directory.check(checkpoint, place)


def consolidate(source: str | os.PathLike[str], path: str | os.PathLike[str], *, is_weights_only: bool = False) -> None:
    """Write one file of a sharded checkpoint. CheckpointError: it is none, or that is not possible."""
    index = read(source, is_whole=False)
    if directory.place_of(index) is None:
        raise CheckpointError(f"{os.fspath(source)} is one file already")
    write(directory.read_whole(format.without_run(index) if is_weights_only else index), path)


def warn_of_unsafe_torch(version: str) -> None:
    """Before 2.10 torch's `weights_only` does not keep a file from running code."""
    major, minor = map(int, version.split(".")[:2])
    if (major, minor) < (2, 10):
        warnings.warn(
            f"torch {version} can be made to run code by a checkpoint's file in spite of weights_only=True "
            "(CVE-2026-24747, GHSA-63cw-57p8-fm3p): upgrade to torch 2.10, or load only files that you trust",
            stacklevel=3,
        )


def exists(path: str | os.PathLike[str]) -> bool:
    """A file is there; a link that leads nowhere is none. StoreUnreachable: a URL's store does not say."""
    if is_url(path):
        return remote.exists(os.fspath(path))
    return _local(path).exists()


def link(target: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    """Put a relative symbolic link to `target` in the place of `path`. False: that cannot be done here."""
    if is_url(path):
        return False
    place = _local(path)
    temporary = place.parent / _temporary_name()
    try:
        temporary.symlink_to(os.path.relpath(_local(target), place.parent))
        if directory.is_checkpoint(place) and not place.is_symlink():
            directory.remove(place, temporary_name=_temporary_name())
        os.replace(temporary, place)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def duplicate(target: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Give a file a second name, which stays when the first goes: one file with two names where the file system has
    that, else a copy. CheckpointError: what stood at `path` stands there still."""
    if is_url(target):
        remote.copy(os.fspath(target), os.fspath(path))
        return
    if directory.is_checkpoint(_local(target)):
        copy = DirectoryDraft(path)
        try:
            shutil.copytree(_local(target), copy.place, copy_function=_linked, dirs_exist_ok=True)
            copy.publish()
        finally:
            copy.discard()
        return
    with draft_file(path) as draft:
        draft.unlink()
        _linked(_local(target), draft)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file or link; a missing one is fine."""
    if is_url(path):
        remote.remove(os.fspath(path))
        return
    target = _local(path)
    try:
        if directory.is_checkpoint(target) and not target.is_symlink():
            directory.remove(target, temporary_name=_temporary_name())
        else:
            target.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot remove the checkpoint {target}: {error}") from error


def remove_abandoned(place: str | os.PathLike[str]) -> None:
    """Remove the temporary files of processes of this host that ended while they wrote. At a URL there are none."""
    if is_url(place):
        return
    for file in _local(place).glob(f".{socket.gethostname()}.*.tmp"):
        pid = file.name.split(".")[-3]
        if pid.isdigit() and not _is_running(int(pid)):
            with suppress(OSError):  # another run may have been faster
                shutil.rmtree(file) if file.is_dir() else file.unlink()


def _read_url(url: str, allow_pickle: bool, is_whole: bool) -> dict[str, Any]:
    if remote.has_index(url):
        with remote.download(join(url, directory.INDEX)) as copy:
            index = directory.with_place(_read(copy, url, allow_pickle), url.rstrip("/"))
        return directory.read_whole(index) if is_whole else index
    with remote.download(url) as copy:
        return _read(copy, url, allow_pickle)


def _read(source: Path, name: str, allow_pickle: bool) -> dict[str, Any]:
    """A local file; `name` is how errors call it."""
    checkpoint = _load(source, name, allow_pickle)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise NotACheckpoint(
            f"{name} is not a checkpoint: it holds {_contents(checkpoint)}, but no 'state_dict'. Load weights alone "
            "with module.load_state_dict(torch.load(path))"
        )
    if "raylit" not in checkpoint:
        return checkpoint
    if (damaged := _first_damaged(source)) is not None:
        raise DamagedCheckpoint(f"{name} is damaged: {damaged}. Use the checkpoint before it")
    about = checkpoint["raylit"]
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise NotACheckpoint(f"{name} is not a checkpoint: its entry 'raylit' does not say of which format it is")
    if about["format"] > FORMAT:
        raise CheckpointError(
            f"{name} is of a newer raylit: written by raylit {checkpoint.get('raylit_version')} in format "
            f"{about['format']}; this raylit reads up to format {FORMAT}: upgrade raylit"
        )
    return directory.without_place(checkpoint)


def _linked(file: Any, path: Any) -> None:
    """One file with two names where the file system has that, else a copy."""
    try:
        os.link(file, path)
    except OSError:
        shutil.copyfile(file, path)
        with open(path, "rb") as copy:
            os.fsync(copy.fileno())


def _temporary_name() -> str:
    """Hidden, and telling whose it is."""
    return f".{socket.gethostname()}.{os.getpid()}.{uuid4().hex}.tmp"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _local(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser()


def _sync_directory(directory: Path) -> None:
    """Make a rename in it outlive a power failure, where the file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no fsync of a directory; the file is whole either way
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(source: Path, name: str, allow_pickle: bool) -> Any:
    warn_of_unsafe_torch(torch.__version__)
    try:
        return torch.load(source, map_location="cpu", weights_only=not allow_pickle)
    except PermissionError as error:
        raise CheckpointError(f"cannot read the checkpoint {name}: {error}") from error
    except Exception as error:
        kind: type[CheckpointError] = CheckpointError
        # Damage first: damaged names look like foreign classes, and nobody should trust a damaged file for that.
        if zipfile.is_zipfile(source) and (damaged := _first_damaged(source)) is not None:
            kind, message = DamagedCheckpoint, f"{name} is damaged: {damaged}. Use another checkpoint"
        elif allow_pickle and isinstance(error, (ImportError, AttributeError)):
            message = f"{name} holds an object whose class is not importable here: {error}"
        elif not allow_pickle and (objects := _pickled_objects(source, error)):
            message = (
                f"{name} holds pickled objects ({objects}), whose loading can run code. If you trust the file, pass "
                "weights_only=False"
            )
        else:
            reason = str(error) or type(error).__name__
            kind = DamagedCheckpoint
            message = f"{name} is damaged, or not a checkpoint: {reason}. Use another checkpoint"
        raise kind(message) from error


def _pickled_objects(source: Path, error: Exception) -> str:
    """What weights_only has refused, by name; empty where that is not what went wrong."""
    try:
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(source))))
    except Exception:  # damaged, or of torch's format before 1.6, which that function does not read
        return "in torch's old format" if "Unsupported global" in str(error) else ""


def _first_damaged(source: Path) -> str | None:
    """What is wrong with the first record that its checksum does not fit; None: sound. About 2 GB/s."""
    try:
        with zipfile.ZipFile(source) as archive:
            record = archive.testzip()
    except Exception as error:  # of whatever kind zipfile makes of flipped bits
        return f"{type(error).__name__}: {error}"
    return None if record is None else f"{record} does not match its checksum"


def _nearby(directory: Path, *, count: int = 10) -> str:
    """What checkpoints the directory has, for an error's end."""
    if not directory.is_dir():
        return f" Nor is there a directory {directory}"
    names = sorted(entry.name for entry in directory.iterdir() if entry.suffix == ".ckpt")
    if not names:
        return f" No *.ckpt is in {directory}"
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f" In {directory}: {', '.join(names[:count])}{more}"


def _contents(value: Any) -> str:
    return f"the keys {list(value)[:5]}" if isinstance(value, dict) else f"an object of type {type(value).__name__}"
