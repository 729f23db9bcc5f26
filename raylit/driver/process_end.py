"""ProcessEnd: what the driver's host tells of a worker's process, which is not a child of this one. Driver."""

import contextlib
import os

from raylit.compat.ray_core import parse_crash_signal

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
