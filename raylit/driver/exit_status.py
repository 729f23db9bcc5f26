"""ExitStatus: how a process on the driver's host has ended, also one that is not its child. Driver."""

import contextlib
import errno
import fcntl
import os
import signal
import struct

_PIDFD_GET_INFO = 0xC040FF0B
"""_IOWR(0xFF, 11, struct pidfd_info of 64 bytes), linux/pidfd.h"""
_PIDFD_INFO_EXIT = 1 << 3
_INFO = struct.Struct("=QQ11Ii")
"""Mask, control group, eleven ids, exit status."""


class ExitStatus:
    """Ray tells of a death, but not how the process died: the kernel does, from Linux 6.15 on."""

    def __init__(self, pid: int) -> None:
        """To be made while the process lives."""
        self._pid = pid
        self._num_oom_kills = _num_oom_kills()
        self._pidfd: int | None = None
        with contextlib.suppress(OSError, AttributeError):  # not Linux, or gone
            self._pidfd = os.pidfd_open(pid)

    def __del__(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)

    def in_words(self) -> str | None:
        """None: it cannot be known here."""
        status = self._status()
        return None if status is None else describe(status, num_oom_kills=_num_oom_kills() - self._num_oom_kills)

    @property
    def is_stopped(self) -> bool:
        """The process lives, but stands still since a SIGSTOP or the like."""
        try:
            with open(f"/proc/{self._pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "T"
        except (OSError, IndexError):
            return False

    def _status(self) -> int | None:
        """As of waitpid."""
        if self._pidfd is None:
            return None
        buffer = bytearray(_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13))
        try:
            fcntl.ioctl(self._pidfd, _PIDFD_GET_INFO, buffer)
        except OSError as error:
            # An older kernel, or a process that is not reaped yet.
            assert error.errno in (errno.ENOTTY, errno.EINVAL, errno.ESRCH, errno.ENOSYS), error
            return None
        mask, *_, status = _INFO.unpack(buffer)
        return status if mask & _PIDFD_INFO_EXIT else None


def describe(status: int, *, num_oom_kills: int) -> str:
    """A status of waitpid, and how many processes this host's kernel has killed for memory meanwhile."""
    if not os.WIFSIGNALED(status):
        return f"its process ended with exit code {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number == signal.SIGKILL and num_oom_kills > 0:
        return f"killed by the kernel, probably out of memory ({memory_in_use()})"
    return _SIGNALS.get(number, f"killed by signal {number} ({signal.strsignal(number)})")


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

_SIGNALS: dict[int, str] = {
    signal.SIGKILL: "killed by SIGKILL, from outside of raylit",
    signal.SIGSEGV: "crashed (segmentation fault)",
    signal.SIGABRT: "crashed (aborted by a library: see what it has printed)",
    signal.SIGBUS: "crashed (bus error; /dev/shm may be full)",
    signal.SIGFPE: "crashed (arithmetic error)",
    signal.SIGILL: "crashed (illegal instruction: a library is built for another processor)",
    signal.SIGTERM: "ended by SIGTERM, from outside of raylit",
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
