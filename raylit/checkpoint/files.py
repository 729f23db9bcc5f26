"""Reading and writing of checkpoint files, local or at URLs that fsspec knows. Driver and workers.

Files are written as a whole or not at all. Reading tells a damaged file apart from one whose loading could run code.
Only this module, `remote`, `sharded` and `dcp_files` open checkpoints.
"""

import errno
import fcntl
import io
import mmap
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
from raylit.checkpoint.layout import INDEX
from raylit.errors import CheckpointError, DamagedCheckpoint
from raylit.storage import file_system, is_url, join


class NotACheckpoint(CheckpointError):
    """Error raised for a file that is intact but is not a checkpoint."""


def write(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint to a hidden file in the same directory, flush it to the disk and rename it.

    Directories are created as needed. A symbolic link at `path` is replaced, not followed. At a URL the object appears
    when its upload ends.

    Raises:
        CheckpointError: if writing failed; the previous file at `path` is unchanged.
    """
    write_with(lambda file: save(dict(checkpoint), file), path)


def write_with(save_to: Callable[[IO[bytes]], None], path: str | os.PathLike[str]) -> None:
    """Call `save_to` with an open file and put the result at `path`, in the same way as `write`.

    At a URL the file is complete in a temporary directory before its upload begins.
    """
    try:
        with remote.draft_upload(os.fspath(path)) if is_url(path) else draft_file(path) as draft:
            fill(save_to, draft)
    except (OSError, RuntimeError, AttributeError, TypeError, pickle.PicklingError) as error:
        raise CheckpointError(f"cannot write the checkpoint {os.fspath(path)}: {error}") from error


def fill(save_to: Callable[[IO[bytes]], None], path: str | os.PathLike[str]) -> None:
    """Call `save_to` with an existing, empty file, and flush it to the disk.

    Raises:
        OSError: among other reasons, if a symbolic link has been put in the file's place.
    """
    with _UncachedFile(path) as file:
        save_to(file)
        file.flush()
        os.fsync(file.fileno())


def save(value: Any, file: IO[bytes]) -> None:
    """Write a value in torch's format, with checksums even if torch is set to leave them out."""
    has_checksums, handled = torch.serialization.get_crc32_options(), sys.exc_info()[1]
    torch.serialization.set_crc32_options(True)
    try:
        torch.save(value, file)
    except RuntimeError as error:
        # After an error of the file torch still writes the archive's end, and the error of that hides the first one.
        first = error.__context__
        raise (error if first is None or first is handled else first) from None
    finally:
        torch.serialization.set_crc32_options(has_checksums)


_BUFFER_BYTES = 8 * 2**20


class _UncachedFile(io.FileIO):
    """Existing file that is written through an aligned buffer past the page cache, where the file system allows it.

    Filling the page cache takes the training's cores: on two cores a save of 400 MB cost the loop 1.1 s through it and
    0.2 s past it (tests/benchmarks/checkpoint.py). Data that has not been flushed is lost on close.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._direct_flag = getattr(os, "O_DIRECT", 0)
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._num_buffered = 0
        super().__init__(path, "wb", opener=self._open)

    def _open(self, path: str, flags: int) -> int:
        flags = os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
        try:
            return os.open(path, flags | self._direct_flag)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct_flag = 0  # a file system such as tmpfs
            return os.open(path, flags)

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        num_bytes = len(rest)
        while len(rest) > 0:
            num_taken = min(len(rest), _BUFFER_BYTES - self._num_buffered)
            self._buffer[self._num_buffered : self._num_buffered + num_taken] = rest[:num_taken]
            self._num_buffered += num_taken
            rest = rest[num_taken:]
            if self._num_buffered == _BUFFER_BYTES:
                self._write_buffer()
        return num_bytes

    def flush(self) -> None:
        """Write the rest of the buffer, whose size need not be a multiple of the disk's blocks."""
        if self._num_buffered > 0:
            self._leave_direct()
            self._write_buffer()

    def close(self) -> None:
        self._num_buffered = 0
        super().close()

    def _write_buffer(self) -> None:
        with memoryview(self._buffer) as buffer:
            start, end = 0, self._num_buffered
            self._num_buffered = 0
            while start < end:
                try:
                    start += super().write(buffer[start:end])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct_flag:
                        raise
                    self._leave_direct()  # the disk has larger blocks

    def _leave_direct(self) -> None:
        if self._direct_flag:
            flags = fcntl.fcntl(self.fileno(), fcntl.F_GETFL)
            fcntl.fcntl(self.fileno(), fcntl.F_SETFL, flags & ~self._direct_flag)
            self._direct_flag = 0


class DirectoryDraft:
    """Hidden directory next to a path, which replaces that path when it is published.

    The code that fills the directory flushes its files to the disk.
    """

    subdirectory = ""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Create the hidden directory.

        Raises:
            CheckpointError: if that is not possible.
        """
        self._target = _to_local_path(path).absolute()  # workers have other working directories
        self.place = str(self._target.parent / _make_temporary_name())
        self.index = os.path.join(self.place, INDEX)
        try:
            directory.check_replaceable(self._target)
            os.makedirs(self.place)
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint {self._target}: {error}") from error

    def publish(self) -> None:
        """Move the directory to the path.

        Raises:
            CheckpointError: if that failed; the previous content of the path is unchanged.
        """
        try:
            directory.move_into_place(Path(self.place), self._target)
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint {self._target}: {_describe_error(error)}") from error

    def discard(self) -> None:
        """Remove what is left of the draft, or of the directory that it replaced."""
        directory.discard(Path(self.place))


def directory_draft(path: str | os.PathLike[str]) -> DirectoryDraft | remote.RemoteDirectoryDraft:
    """Create a draft for a checkpoint that is a directory.

    Write the parts to its `place`, then the checkpoint, which names the parts in `subdirectory`, to its `index`; then
    publish it.

    Raises:
        CheckpointError: if it cannot be created.
    """
    return remote.RemoteDirectoryDraft(os.fspath(path)) if is_url(path) else DirectoryDraft(path)


def write_bytes(content: bytes, path: str) -> None:
    """Write a small file into a draft."""
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
    """Yield a hidden, empty file that replaces `path` after the block, which must flush it to the disk.

    Raises:
        CheckpointError: if it cannot be written; whatever the block raises passes through. In both cases the previous
            file at `path` is unchanged.
    """
    target = _to_local_path(path)
    draft = target.parent / _make_temporary_name()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.touch(exist_ok=False)
            yield draft
            os.replace(draft, target)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CheckpointError(f"cannot write the checkpoint {target}: {_describe_error(error)}") from error
    except CheckpointError as error:
        name_target(error, draft=draft, target=target)
        raise
    _sync_directory(target.parent)


def name_target(error: CheckpointError, *, draft: str | Path, target: str | os.PathLike[str]) -> None:
    """Replace the draft's path in an error's message by the path that was asked for."""
    error.args = (str(error).replace(str(draft), os.fspath(target)),)


def read(path: str | os.PathLike[str], *, allow_pickle: bool = False, is_whole: bool = True) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU, from a path or a URL that fsspec knows; Lightning's own files too.

    Args:
        path: The file, or the directory of a sharded checkpoint.
        allow_pickle: Unpickle any object, which can run code: only for files that you trust.
        is_whole: For a sharded checkpoint, also read the parts that the workers have written; else it has placeholders.

    Raises:
        CheckpointError: if there is no such file, it is not a checkpoint, of a newer format, or has pickled objects
            without `allow_pickle`.
        DamagedCheckpoint: if it differs from what was written.
    """
    if is_url(path):
        return _read_url(os.fspath(path), allow_pickle, is_whole)
    source = _to_local_path(path)
    if directory.is_checkpoint(source):
        index = directory.attach_directory(_read(source / INDEX, str(source), allow_pickle), source)
        return directory.read_whole(index) if is_whole else index
    if source.is_dir():
        raise NotACheckpoint(f"{source} is a directory, not a checkpoint file.{_describe_neighbours(source)}")
    if not source.exists():
        raise CheckpointError(f"there is no checkpoint {source}.{_describe_neighbours(source.parent)}")
    if not source.is_file():
        raise NotACheckpoint(f"{source} is a pipe, a socket or a device, not a checkpoint file")
    return _read(source, str(source), allow_pickle)


def check_parts(checkpoint: Mapping[str, Any]) -> None:
    """Compare the parts that placeholders stand for with their checksums, without keeping them in memory.

    Raises:
        DamagedCheckpoint: if a part differs from what was written.
    """
    if (place := directory.place_of(checkpoint)) is not None:
        directory.check(checkpoint, place)


def consolidate(source: str | os.PathLike[str], path: str | os.PathLike[str], *, is_weights_only: bool = False) -> None:
    """Write a sharded checkpoint as one file.

    Raises:
        CheckpointError: if it is not sharded, or cannot be read or written.
    """
    index = read(source, is_whole=False)
    if directory.place_of(index) is None:
        raise CheckpointError(f"{os.fspath(source)} is one file already")
    write(directory.read_whole(format.drop_run_state(index) if is_weights_only else index), path)


def warn_of_unsafe_torch(version: str) -> None:
    """Warn that before torch 2.10 `weights_only` does not keep a file from running code."""
    major, minor = map(int, version.split(".")[:2])
    if (major, minor) < (2, 10):
        warnings.warn(
            f"torch {version} can be made to run code by a checkpoint's file in spite of weights_only=True "
            "(CVE-2026-24747, GHSA-63cw-57p8-fm3p): upgrade to torch 2.10, or load only files that you trust",
            stacklevel=3,
        )


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether there is a file; a dangling link counts as none.

    Raises:
        StoreUnreachable: if a URL's store does not answer.
    """
    if is_url(path):
        return remote.exists(os.fspath(path))
    return _to_local_path(path).exists()


def link(target: str | os.PathLike[str], path: str | os.PathLike[str]) -> bool:
    """Replace `path` by a relative symbolic link to `target`; return False where that is not possible."""
    if is_url(path):
        return False
    place = _to_local_path(path)
    temporary = place.parent / _make_temporary_name()
    try:
        temporary.symlink_to(os.path.relpath(_to_local_path(target), place.parent))
        if directory.is_checkpoint(place) and not place.is_symlink():
            directory.remove(place, temporary_name=_make_temporary_name())
        os.replace(temporary, place)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True


def duplicate(target: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Give a file a second name that stays when the first is removed.

    This is a hard link where the file system supports it, else a copy.

    Raises:
        CheckpointError: if that failed; the previous file at `path` is unchanged.
    """
    if is_url(target):
        remote.copy(os.fspath(target), os.fspath(path))
        return
    if directory.is_checkpoint(_to_local_path(target)):
        copy = DirectoryDraft(path)
        try:
            shutil.copytree(_to_local_path(target), copy.place, copy_function=_link_or_copy, dirs_exist_ok=True)
            copy.publish()
        finally:
            copy.discard()
        return
    with draft_file(path) as draft:
        draft.unlink()
        _link_or_copy(_to_local_path(target), draft)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a file, link or sharded checkpoint; a missing one is not an error."""
    if is_url(path):
        remote.remove(os.fspath(path))
        return
    target = _to_local_path(path)
    try:
        if directory.is_checkpoint(target) and not target.is_symlink():
            directory.remove(target, temporary_name=_make_temporary_name())
        else:
            target.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot remove the checkpoint {target}: {error}") from error


def remove_abandoned(place: str | os.PathLike[str]) -> None:
    """Remove the temporary files of processes of this host that ended while writing; at a URL there are none."""
    if is_url(place):
        return
    for file in _to_local_path(place).glob(f".{socket.gethostname()}.*.tmp"):
        pid = file.name.split(".")[-3]
        if pid.isdigit() and not _is_running(int(pid)):
            with suppress(OSError):  # another run may have removed it first
                shutil.rmtree(file) if file.is_dir() else file.unlink()


def _describe_error(error: OSError) -> str:
    """Return the error's message without its paths, which may be those of a draft."""
    return f"[Errno {error.errno}] {error.strerror}" if error.errno is not None and error.strerror else str(error)


def _read_url(url: str, allow_pickle: bool, is_whole: bool) -> dict[str, Any]:
    if remote.has_index(url):
        with remote.download(join(url, INDEX)) as copy:
            index = directory.attach_directory(_read(copy, url, allow_pickle), url.rstrip("/"))
        return directory.read_whole(index) if is_whole else index
    with remote.download(url) as copy:
        return _read(copy, url, allow_pickle)


def _read(source: Path, name: str, allow_pickle: bool) -> dict[str, Any]:
    """Read and check a local file; `name` names it in errors."""
    checkpoint = _load(source, name, allow_pickle)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise NotACheckpoint(
            f"{name} is not a checkpoint: it holds {_describe_contents(checkpoint)}, but no 'state_dict'. Load weights "
            "alone with module.load_state_dict(torch.load(path))"
        )
    if "raylit" not in checkpoint:
        return checkpoint
    if (damaged := _find_damaged_record(source)) is not None:
        raise DamagedCheckpoint(f"{name} is damaged: {damaged}. Use the checkpoint before it")
    about = checkpoint["raylit"]
    if not isinstance(about, dict) or not isinstance(about.get("format"), int):
        raise NotACheckpoint(f"{name} is not a checkpoint: its entry 'raylit' does not say of which format it is")
    if about["format"] > FORMAT:
        raise CheckpointError(
            f"{name} is of a newer raylit: written by raylit {checkpoint.get('raylit_version')} in format "
            f"{about['format']}; this raylit reads up to format {FORMAT}: upgrade raylit"
        )
    return directory.drop_directory(checkpoint)


def _link_or_copy(file: Any, path: Any) -> None:
    """Create a hard link, or a copy where the file system has no hard links."""
    try:
        os.link(file, path)
    except OSError:
        shutil.copyfile(file, path)
        with open(path, "rb") as copy:
            os.fsync(copy.fileno())


def _make_temporary_name() -> str:
    """Return a new hidden name that contains host and process id."""
    return f".{socket.gethostname()}.{os.getpid()}.{uuid4().hex}.tmp"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True


def _to_local_path(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser()


def _sync_directory(directory: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename survives a power failure; a no-op if unsupported."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot fsync a directory; the file is complete either way
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
        # Damage first: damaged names look like foreign classes, and the message would advise to trust the file.
        if zipfile.is_zipfile(source) and (damaged := _find_damaged_record(source)) is not None:
            kind, message = DamagedCheckpoint, f"{name} is damaged: {damaged}. Use another checkpoint"
        elif allow_pickle and isinstance(error, (ImportError, AttributeError)):
            message = f"{name} holds an object whose class is not importable here: {error}"
        elif not allow_pickle and (objects := _find_pickled_objects(source, error)):
            message = (
                f"{name} holds pickled objects ({objects}), whose loading can run code. If you trust the file, pass "
                "weights_only=False"
            )
        else:
            reason = str(error) or type(error).__name__
            kind = DamagedCheckpoint
            message = f"{name} is damaged, or not a checkpoint: {reason}. Use another checkpoint"
        raise kind(message) from error


def _find_pickled_objects(source: Path, error: Exception) -> str:
    """Return the names that weights_only has refused; empty if that was not the problem."""
    try:
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(source))))
    except Exception:  # damaged, or in torch's format before 1.6, which that function does not read
        return "in torch's old format" if "Unsupported global" in str(error) else ""


def _find_damaged_record(source: Path) -> str | None:
    """Describe the first record that does not match its checksum; None if all do. Reads about 2 GB/s."""
    try:
        with zipfile.ZipFile(source) as archive:
            record = archive.testzip()
    except Exception as error:  # zipfile raises various exceptions for flipped bits
        return f"{type(error).__name__}: {error}"
    return None if record is None else f"{record} does not match its checksum"


def _describe_neighbours(directory: Path, *, count: int = 10) -> str:
    """Return a sentence for an error message about the checkpoints in the directory."""
    if not directory.is_dir():
        return (
            f" Nor is there a directory {directory} on {socket.gethostname()}, where it is read: copy a checkpoint of "
            "another host to this one, or give a URL that both reach"
        )
    names = sorted(entry.name for entry in directory.iterdir() if entry.suffix == ".ckpt")
    if not names:
        return f" No *.ckpt is in {directory}"
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return f" In {directory}: {', '.join(names[:count])}{more}"


def _describe_contents(value: Any) -> str:
    return f"the keys {list(value)[:5]}" if isinstance(value, dict) else f"an object of type {type(value).__name__}"
