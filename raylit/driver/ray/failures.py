"""Why a worker ended, in one sentence: from Ray's error, the exit status and the host's state."""

import contextlib
import itertools
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Sequence

import cloudpickle
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
)

from raylit.compat import ray_core
from raylit.compat.ray_core import parse_crash_signal
from raylit.compat.torch_data import find_loader_death
from raylit.errors import RaylitError, RemoteTraceback, WorkerDied, WorkerFailed, is_frame_hidden, is_traceback_full
from raylit.protocol.messages import Failed
from raylit.worker.job import WorkerContext

_LAST_BYTES = 2**16


class ProcessEnd:
    """Ray tells of a death, but not how the process died: its log says so after a crash, and the kernel counts what it
    kills for memory. A SIGKILL by somebody else and `os._exit` leave no trace."""

    def __init__(self, pid: int, *, log_path: str) -> None:
        """`log_path`: "" where the process has none."""
        self._pid = pid
        self._log_path = log_path
        self.note_start()

    def note_start(self) -> None:
        """Note that a command starts: an earlier kill for memory says nothing of a later death."""
        self._num_oom_kills = _num_oom_kills()

    def describe(self) -> str | None:
        """Say how the dead process has ended. None: that cannot be known here."""
        return describe_end(
            read_log_end(self._log_path), pid=self._pid, num_oom_kills=_num_oom_kills() - self._num_oom_kills
        )

    @property
    def is_stopped(self) -> bool:
        """The process lives, but stands still since a SIGSTOP or the like."""
        try:
            with open(f"/proc/{self._pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "T"
        except (OSError, IndexError):
            return False


def describe_end(log_end: str, *, pid: int, num_oom_kills: int) -> str | None:
    """Say how a process has ended, from its log and how many processes this host's kernel has killed for memory since
    the process began what it died of. None: neither tells."""
    if (name := parse_crash_signal(log_end, pid=pid)) is not None:
        return _CRASHES.get(name, f"crashed ({name})")
    if num_oom_kills > 0:
        return f"killed by the kernel, probably out of memory ({memory_in_use()})"
    return None


def read_log_end(path: str) -> str:
    """Read the last of a log; "" where there is none on this host."""
    try:
        with open(path, "rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _LAST_BYTES))
            return log.read().decode(errors="replace")
    except OSError:
        return ""


def memory_in_use() -> str:
    """Of this host or container, now that the dead process's part is free again."""
    total, available = _kilobytes("/proc/meminfo", "MemTotal:"), _kilobytes("/proc/meminfo", "MemAvailable:")
    where, used = "host", total - available
    for limit_file, used_file in _CONTAINER_FILES:
        limit = _bytes(limit_file) // 1024
        if 0 < limit < total:
            where, total, used = "container", limit, _bytes(used_file) // 1024
    return f"the {where} has {total / 2**20:.1f} GB, of which {used / 2**20:.1f} GB are still in use"


_CONTAINER_FILES = (
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
)
"""Limit and use of a container, as it sees them itself, in both versions of control groups."""

_CRASHES = {
    "SIGSEGV": "crashed (segmentation fault)",
    "SIGABRT": "crashed (aborted by a library: see what it has printed)",
    "SIGBUS": "crashed (bus error; /dev/shm may be full)",
    "SIGFPE": "crashed (arithmetic error)",
    "SIGILL": "crashed (illegal instruction: a library is built for another processor)",
}


def _num_oom_kills() -> int:
    return _kilobytes("/proc/vmstat", "oom_kill")


def _kilobytes(path: str, name: str) -> int:
    """A number out of one of the kernel's tables; 0 where there is none."""
    with contextlib.suppress(OSError), open(path) as lines:
        return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
    return 0


def _bytes(path: str) -> int:
    """The number that is all of a control group's file; 0 where there is none, or no limit."""
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        return int(file.read())
    return 0


DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
"""What Ray answers in place of an actor that has died."""


def explain_failure(error: BaseException, context: WorkerContext) -> Failed:
    """For the driver, in the worker."""
    error = _with_reason(error)
    told = traceback.TracebackException.from_exception(error)
    _hide_frames(told)
    pickled: bytes | None
    try:
        pickled = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)
    except Exception:
        pickled = None
    return Failed(
        rank=context.rank,
        host=context.host,
        traceback="".join(told.format()),
        summary="".join(told.format_exception_only()).strip().splitlines()[0],
        error=pickled,
        is_consequence=isinstance(error, Exception) and _is_consequence(error),
        is_harmless=is_harmless(error),
    )


def is_harmless(error: BaseException) -> bool:
    """To the process that it was raised in: a user's mistake, which says nothing of memory, a device or a peer."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return all(
        isinstance(each, Exception)
        and not isinstance(each, (MemoryError, WorkerDied, WorkerFailed))
        and not _is_consequence(each)
        and not (isinstance(each, (RuntimeError, OSError)) and _HARMFUL.search(str(each)))
        for each in chain
    )


def is_at_one_line(failures: Sequence[Failed]) -> bool:
    """Every rank has failed in the same way at the same place: none is ahead of the others in what they do together."""
    return len({(failure.summary, failure.traceback) for failure in failures}) == 1


def format_traceback(error: BaseException) -> str:
    """The traceback, without the frames that are raylit's or Ray's: the worker's where it was raised there. For where
    the exception itself cannot go."""
    if isinstance(error.__cause__, RemoteTraceback):
        return error.__cause__.text.strip()
    told = traceback.TracebackException.from_exception(error)
    _hide_frames(told)
    return "".join(told.format()).strip()


def raise_failures(failures: Sequence[Failed], *, num_workers: int) -> None:
    """Raise one exception as itself, its cause being the traceback in the worker: of those that came first the lowest
    rank's, rather not one that follows from another. The others are listed below it."""
    primary = [failure for failure in failures if not failure.is_consequence] or list(failures)
    # The first to arrive, together with the ranks that failed in the same way.
    same = sorted((it for it in primary if it.summary == primary[0].summary), key=lambda failure: failure.rank)
    first = same[0]
    ranks = ", ".join(str(failure.rank) for failure in same)
    where = f"{'rank' if len(same) == 1 else 'ranks'} {ranks} of {num_workers} on host {first.host}"
    others = [f"rank {failure.rank}: {failure.summary}" for failure in failures if failure not in same]
    text = f"In {where}:\n{first.traceback}" + "".join(f"\nMeanwhile in {line}" for line in others)
    cause = RemoteTraceback(text)
    if first.error is None:
        raise WorkerFailed(f"an exception that cannot be pickled ended {where}: {first.summary}") from cause
    error = cloudpickle.loads(first.error)
    if isinstance(error, SystemExit):
        # Python ends without a word on it, in whichever process it was called.
        line = call_in(first.traceback, is_last_innermost=True)
        sys.stderr.write(f"raylit: sys.exit({error.code!r}) in {where}{f' ({line})' if line else ''} ends the run\n")
    raise error from cause


def reason_of_death(error: BaseException, exit_words: str | None) -> str:
    """From what Ray says of it and, where it is known, how the process has ended."""
    if isinstance(error, ActorUnavailableError):
        return exit_words or "it cannot be reached"
    text = " ".join(str(error).split())
    is_actor_dead = isinstance(error, ActorDiedError)
    if isinstance(error, OutOfMemoryError) or (is_actor_dead and ray_core.is_memory_monitor_kill(text)):
        used = ray_core.parse_memory_use(text)
        in_use = f"{used[0]} of {used[1]} GB were in use" if used is not None else memory_in_use()
        return f"killed by Ray's memory monitor, as its host ran out of memory ({in_use})"
    if not isinstance(error, ActorDiedError):
        return exit_words or f"its stream of reports ended ({error or type(error).__name__})"
    if error.preempted:
        return "its host was preempted: the cluster has drained it"
    if exit_words is not None:
        return exit_words
    if (why := ray_core.parse_lost_host(text)) is not None:
        return f"Ray has lost its host ({why or 'it does not say why'})"
    if (code := ray_core.parse_exit_code(text)) is not None:
        by = ", after a SIGTERM" if ray_core.is_exit_by_sigterm(text) else ""
        return f"its process ended with exit code {code}{by}"
    if ray_core.is_connection_lost(text):
        return (
            "its process ended without a word: killed (out of memory?), crashed in a library, or ended by os._exit. "
            "The kernel's log on its host (dmesg) tells of the first two"
        )
    return ray_core.strip_preamble(text)


def last_words(log_path: str) -> str:
    """What gloo has said as it ended the process, and where the process's Python code was, to be put behind the reason;
    "" where it was not gloo, or on another host."""
    text = read_log_end(log_path)
    said = re.findall(r"what\(\): (.*)", text)
    if not said or "gloo" not in text:
        return ""
    where = call_in(text.rpartition("Fatal Python error")[2])
    words = _ADDRESS.split(said[-1])[0].strip()
    return (
        f". gloo's last words: {words} A rank was in another collective than one that it spoke to, or had a tensor of "
        "another shape: every rank has to call the same collectives in the same order"
        + (f". This rank was at {where}" if where else "")
    )


def call_in(traceback_text: str, *, is_last_innermost: bool = False) -> str:
    """The innermost line of the user's in a traceback; "" where there is none. faulthandler's begin with it."""
    frames = re.findall(r'File "([^"]+)", line (\d+)(?:,)? in (\S+)', traceback_text)
    own = [
        f"{file}:{line} in {function}"
        for file, line, function in (reversed(frames) if is_last_innermost else frames)
        if not file.startswith((_TORCH, _PYTHON)) and not is_frame_hidden(file)
    ]
    return own[0] if own else ""


_PYTHON = os.path.dirname(threading.__file__) + os.sep
_ADDRESS = re.compile(r"/\S+\(\S*\+0x|$")
"""Ray's list of frames of C begins on the same line."""
_EXIT_S = 0.5
"""For the kernel to have the exit status of a dying process."""
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HARMFUL = re.compile(r"memory|alloc|\b(CUDA|HIP|XLA)\b|cuda|cu(DNN|BLAS|FFT|SOLVER|SPARSE)|device-side", re.IGNORECASE)
_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|\bgloo\b|\bNCCL\b|ProcessGroup|TCPStore|watchdog",
    re.IGNORECASE,
)


def _with_reason(error: BaseException) -> BaseException:
    """Where a DataLoader's process dies while a batch of its is on the way, torch may only see a connection end."""
    deadline = time.monotonic() + _EXIT_S
    while isinstance(error, (ConnectionError, EOFError)) and time.monotonic() < deadline:
        if (death := find_loader_death()) is not None:
            death.__cause__ = error
            return death
        time.sleep(0.02)
    return error


def _is_consequence(error: Exception) -> bool:
    """What a collective says when a peer has left."""
    kinds = {"DistBackendError", "DistNetworkError", "DistStoreError"}
    return type(error).__name__ in kinds or (type(error) is RuntimeError and bool(_CONSEQUENCE.search(str(error))))


def _hide_frames(told: traceback.TracebackException | None) -> None:
    """Of an exception and all that led to it."""
    while told is not None:
        if not is_traceback_full():
            shown = [frame for frame in told.stack if not is_frame_hidden(frame.filename)]
            # What stands between raylit and the user's first line: torch's wrappers around a module.
            inner = list(itertools.dropwhile(lambda frame: frame.filename.startswith(_TORCH), shown))
            if shown or (told.exc_type is not None and issubclass(told.exc_type, RaylitError)):
                told.stack[:] = inner or shown
            # Else it is a mistake of raylit's own, which only its frames can explain.
        for member in getattr(told, "exceptions", None) or ():
            _hide_frames(member)
        _hide_frames(told.__cause__)
        told = told.__context__
