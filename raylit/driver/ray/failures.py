"""The cause of a worker's end in one sentence: from Ray's error, the process's log and the host's state. Both sides."""

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
from raylit.compat.torch_core import find_loader_death
from raylit.errors import RaylitError, RemoteTraceback, WorkerDied, WorkerFailed, is_frame_hidden, is_traceback_full
from raylit.protocol.messages import Failed
from raylit.worker.job import WorkerContext

DEATH_ERRORS = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
"""Errors that Ray raises for an actor that has died."""
_LAST_BYTES = 2**16
_EXIT_S = 0.5
"""Time for the kernel to have the exit status of a dying process."""
_PYTHON = os.path.dirname(threading.__file__) + os.sep
_TORCH = os.path.dirname(torch.__file__) + os.sep
_PACKAGES = os.path.dirname(os.path.dirname(torch.__file__)) + os.sep
_ADDRESS = re.compile(r"/\S+\(\S*\+0x|$")
"""Start of Ray's list of C frames, on the same line."""
_HARMFUL = re.compile(r"memory|alloc|\b(CUDA|HIP|XLA)\b|cuda|cu(DNN|BLAS|FFT|SOLVER|SPARSE)|device-side", re.IGNORECASE)
_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|\bgloo\b|\bNCCL\b|ProcessGroup|TCPStore|watchdog",
    re.IGNORECASE,
)
_CONTAINER_FILES = (
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
)
"""Files with the memory limit and the use of a container, as seen inside it, in both versions of control groups."""
_CRASHES = {
    "SIGSEGV": "crashed (segmentation fault)",
    "SIGABRT": "crashed (aborted by a library: see what it has printed)",
    "SIGBUS": "crashed (bus error; /dev/shm may be full)",
    "SIGFPE": "crashed (arithmetic error)",
    "SIGILL": "crashed (illegal instruction: a library is built for another processor)",
}


class ProcessEnd:
    """Way in which a process on this host ended.

    Ray reports a death, but not its cause: the process's log has it after a crash, and the kernel counts what it kills
    for lack of memory. A SIGKILL by another program and `os._exit` leave no trace.
    """

    def __init__(self, pid: int, *, log_path: str) -> None:
        """Start to observe a process; `log_path` is "" if it has no log."""
        self._pid = pid
        self._log_path = log_path
        self.note_start()

    def note_start(self) -> None:
        """Note that a command starts: an earlier out-of-memory kill does not explain a later death."""
        self._num_oom_kills = _count_oom_kills()

    def describe(self) -> str | None:
        """Describe how the dead process has ended, or return None if that is unknown."""
        return describe_end(
            read_log_end(self._log_path), pid=self._pid, num_oom_kills=_count_oom_kills() - self._num_oom_kills
        )

    @property
    def is_stopped(self) -> bool:
        """True if the process is alive but stopped, as by a SIGSTOP."""
        try:
            with open(f"/proc/{self._pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "T"
        except (OSError, IndexError):
            return False


def describe_end(log_end: str, *, pid: int, num_oom_kills: int) -> str | None:
    """Describe how a process has ended, or return None if neither source tells.

    Args:
        log_end: The end of its log.
        pid: Its process id.
        num_oom_kills: Out-of-memory kills by this host's kernel since the process started its last command.
    """
    if (name := parse_crash_signal(log_end, pid=pid)) is not None:
        return _CRASHES.get(name, f"crashed ({name})")
    if num_oom_kills > 0:
        return f"killed by the kernel, probably out of memory ({describe_memory_use()})"
    return None


def explain_failure(error: BaseException, context: WorkerContext) -> Failed:
    """Build the report of an exception for the driver. Called in the worker."""
    error = _replace_by_loader_death(error)
    formatted = traceback.TracebackException.from_exception(error)
    _hide_frames(formatted)
    pickled: bytes | None
    try:
        pickled = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)
    except Exception:
        pickled = None
    return Failed(
        rank=context.rank,
        host=context.host,
        traceback="".join(formatted.format()),
        summary="".join(formatted.format_exception_only()).strip().splitlines()[0],
        error=pickled,
        is_consequence=isinstance(error, Exception) and _is_consequence(error),
        is_harmless=is_harmless(error),
    )


def raise_failures(failures: Sequence[Failed], *, num_workers: int) -> None:
    """Raise one of the exceptions as itself, with the worker's traceback as its cause.

    It is that of the first failure to arrive that does not follow from another one; of several equal ones that of the
    lowest rank. The other failures are listed in the cause.
    """
    primary = [failure for failure in failures if not failure.is_consequence] or list(failures)
    # The first to arrive, together with the ranks that failed in the same way.
    equal_failures = sorted(
        (it for it in primary if it.summary == primary[0].summary), key=lambda failure: failure.rank
    )
    first = equal_failures[0]
    ranks = ", ".join(str(failure.rank) for failure in equal_failures)
    where = f"{'rank' if len(equal_failures) == 1 else 'ranks'} {ranks} of {num_workers} on host {first.host}"
    others = [f"rank {failure.rank}: {failure.summary}" for failure in failures if failure not in equal_failures]
    text = f"In {where}:\n{first.traceback}" + "".join(f"\nMeanwhile in {line}" for line in others)
    cause = RemoteTraceback(text)
    if first.error is None:
        raise WorkerFailed(f"an exception that cannot be pickled ended {where}: {first.summary}") from cause
    error = cloudpickle.loads(first.error)
    if isinstance(error, SystemExit):
        # Python prints nothing for it, neither here nor in the worker.
        line = find_user_line(first.traceback, is_last_innermost=True)
        sys.stderr.write(f"raylit: sys.exit({error.code!r}) in {where}{f' ({line})' if line else ''} ends the run\n")
    raise error from cause


def format_traceback(error: BaseException) -> str:
    """Format an exception's traceback without frames of raylit and Ray.

    It is for places where the exception itself cannot be sent. The worker's traceback is used if the exception was
    raised there.
    """
    if isinstance(error.__cause__, RemoteTraceback):
        return error.__cause__.text.strip()
    formatted = traceback.TracebackException.from_exception(error)
    _hide_frames(formatted)
    return "".join(formatted.format()).strip()


def is_harmless(error: BaseException) -> bool:
    """Return True for a user's mistake that leaves the process intact: no failure of memory, a device or a peer."""
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
    """Return True if every rank has failed in the same way at the same line.

    No rank is ahead of the others in its collectives then.
    """
    return len({(failure.summary, failure.traceback) for failure in failures}) == 1


def describe_death(error: BaseException, process_end: str | None) -> str:
    """Describe a worker's death from Ray's error and, if known, from how its process ended."""
    if isinstance(error, ActorUnavailableError):
        return process_end or "it cannot be reached"
    text = " ".join(str(error).split())
    is_actor_dead = isinstance(error, ActorDiedError)
    if isinstance(error, OutOfMemoryError) or (is_actor_dead and ray_core.is_memory_monitor_kill(text)):
        used = ray_core.parse_memory_use(text)
        in_use = f"{used[0]} of {used[1]} GB were in use" if used is not None else describe_memory_use()
        return f"killed by Ray's memory monitor, as its host ran out of memory ({in_use})"
    if not isinstance(error, ActorDiedError):
        return process_end or f"its stream of reports ended ({error or type(error).__name__})"
    if error.preempted:
        return "its host was preempted: the cluster has drained it"
    if process_end is not None:
        return process_end
    if (why := ray_core.parse_lost_host(text)) is not None:
        return f"Ray has lost its host ({why or 'it does not say why'})"
    if (code := ray_core.parse_exit_code(text)) is not None:
        suffix = ", after a SIGTERM" if ray_core.is_exit_by_sigterm(text) else ""
        return f"its process ended with exit code {code}{suffix}"
    if ray_core.is_connection_lost(text):
        return (
            "its process ended without a word: killed (out of memory?), crashed in a library, or ended by os._exit. "
            "The kernel's log on its host (dmesg) tells of the first two"
        )
    return ray_core.strip_preamble(text)


def describe_gloo_error(log_path: str) -> str:
    """Describe gloo's error and the user's line that ran, if gloo has ended the process; otherwise return "".

    It needs the process's log, which is only there on this host.
    """
    text = read_log_end(log_path)
    messages = re.findall(r"what\(\): (.*)", text)
    if not messages or "gloo" not in text:
        return ""
    where = find_user_line(text.rpartition("Fatal Python error")[2])
    message = _ADDRESS.split(messages[-1])[0].strip()
    return (
        f". gloo's last words: {message} A rank was in another collective than one that it spoke to, or had a tensor "
        "of another shape: every rank has to call the same collectives in the same order"
        + (f". This rank was at {where}" if where else "")
    )


def find_user_line(traceback_text: str, *, is_last_innermost: bool = False) -> str:
    """Return the user's innermost line in a traceback, or "" if there is none. faulthandler prints it first.

    Lines of installed packages count only if there is no other: a dump of all threads has some of their own.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)(?:,)? in (\S+)', traceback_text)
    own = [
        f"{file}:{line} in {function}"
        for file, line, function in (reversed(frames) if is_last_innermost else frames)
        if not file.startswith((_TORCH, _PYTHON)) and not is_frame_hidden(file)
    ]
    return next((line for line in own if not line.startswith(_PACKAGES)), own[0] if own else "")


def describe_memory_use() -> str:
    """Describe the memory in use on this host or container, now that the dead process has freed its own."""
    total, available = _read_kilobytes("/proc/meminfo", "MemTotal:"), _read_kilobytes("/proc/meminfo", "MemAvailable:")
    where, used = "host", total - available
    for limit_file, used_file in _CONTAINER_FILES:
        limit = _read_bytes(limit_file) // 1024
        if 0 < limit < total:
            where, total, used = "container", limit, _read_bytes(used_file) // 1024
    return f"the {where} has {total / 2**20:.1f} GB, of which {used / 2**20:.1f} GB are still in use"


def read_log_end(path: str) -> str:
    """Return the end of a log, or "" if it is not on this host."""
    try:
        with open(path, "rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _LAST_BYTES))
            return log.read().decode(errors="replace")
    except OSError:
        return ""


def _count_oom_kills() -> int:
    return _read_kilobytes("/proc/vmstat", "oom_kill")


def _read_kilobytes(path: str, name: str) -> int:
    """Return a number of one of the kernel's tables, 0 if there is none."""
    with contextlib.suppress(OSError), open(path) as lines:
        return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
    return 0


def _read_bytes(path: str) -> int:
    """Return the number in a control group's file, 0 if there is none, or no limit."""
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        return int(file.read())
    return 0


def _replace_by_loader_death(error: BaseException) -> BaseException:
    """Return the death of a DataLoader's process as the error, if there was one.

    torch may only see a connection end if the process dies while it sends a batch.
    """
    deadline = time.monotonic() + _EXIT_S
    while isinstance(error, (ConnectionError, EOFError)) and time.monotonic() < deadline:
        if (death := find_loader_death()) is not None:
            death.__cause__ = error
            return death
        time.sleep(0.02)
    return error


def _is_consequence(error: Exception) -> bool:
    """Return True for the errors that a collective raises when a peer has gone."""
    kinds = {"DistBackendError", "DistNetworkError", "DistStoreError"}
    return type(error).__name__ in kinds or (type(error) is RuntimeError and bool(_CONSEQUENCE.search(str(error))))


def _hide_frames(formatted: traceback.TracebackException | None) -> None:
    """Remove hidden frames from an exception and from all that led to it."""
    while formatted is not None:
        if not is_traceback_full():
            visible = [frame for frame in formatted.stack if not is_frame_hidden(frame.filename)]
            # Frames between raylit and the user's first line are torch's wrappers around a module.
            inner = list(itertools.dropwhile(lambda frame: frame.filename.startswith(_TORCH), visible))
            if visible or (formatted.exc_type is not None and issubclass(formatted.exc_type, RaylitError)):
                formatted.stack[:] = inner or visible
            # Otherwise it is a mistake in raylit itself, which only its frames can explain.
        for member in getattr(formatted, "exceptions", None) or ():
            _hide_frames(member)
        _hide_frames(formatted.__cause__)
        formatted = formatted.__context__
