"""Janitor: clears away what the embedded node leaves, when the driver says so or is gone. A process of its own.

Run as a file with the standard library alone: it costs some MB, and outlives a driver that is killed.
"""

import contextlib
import fcntl
import glob
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator

MARK = "RAYLIT_EMBEDDED_NODE"
"""In the environment of the embedded node's processes, with the node's own directory as its value."""

PREFIX = "rl-"
"""How the name of a node's directory begins."""
SESSIONS = "raylit.sessions"
"""In the node's directory: the sessions of the node's processes, a number in each line."""

_LOCK = "raylit.lock"
"""In the node's directory, held by the janitor for as long as it lives."""
_ABANDONED_S = 60.0
"""The least age of a directory that is nobody's: a young one may be about to be locked."""
_BY_THEMSELVES_S = 3.0
"""For what is not Ray's: multiprocessing's resource tracker still has the blocks of the dead to remove."""
_ALL_ENDED_S = 10.0
_PERIOD_S = 0.05


class Janitor:
    """The driver's end of it. Linux only: elsewhere there is no /proc to find the processes by."""

    def __init__(self, directory: str) -> None:
        """`directory` is removed with all that is in it once no process of the node is left."""
        lock = os.open(os.path.join(directory, _LOCK), os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), directory],
            stdin=subprocess.PIPE,
            pass_fds=[lock],
            # A Ctrl-C in the terminal, or a signal to the driver's group, is not for it.
            start_new_session=True,
            cwd="/",
        )
        os.close(lock)

    def finish(self) -> None:
        """Have it done now; returns when it is."""
        assert self._process.stdin is not None
        # A word, not the pipe's end: a fork of the driver may have the pipe as well.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_BY_THEMSELVES_S + _ALL_ENDED_S)


def _main(driver: int, directory: str) -> None:
    session = os.getsid(driver) if os.getppid() == driver else 0
    _remove_abandoned(os.path.dirname(directory))
    _wait_for_end_of(driver)
    started_s = time.monotonic()
    while (waited_s := time.monotonic() - started_s) < _ALL_ENDED_S:
        found = list(_processes(directory, {session, *_recorded_sessions(directory)}))
        for pid, is_ray in found:
            if is_ray or waited_s > _BY_THEMSELVES_S:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if not found:
            break
        time.sleep(_PERIOD_S)
    shutil.rmtree(directory, ignore_errors=True)


def _recorded_sessions(directory: str) -> list[int]:
    try:
        with open(os.path.join(directory, SESSIONS)) as lines:
            return [int(line) for line in lines]
    except OSError:  # the node has not come that far
        return []


def _remove_abandoned(parent: str) -> None:
    """Directories of nodes that were killed together with their janitors, as job managers and containers do it.

    The directory for temporary files is everybody's: only what is named as a node's directory is, and belongs to this
    user, is looked at.
    """
    for path in glob.glob(os.path.join(glob.escape(parent), f"{PREFIX}*", _LOCK)):
        with contextlib.suppress(OSError):
            if not _is_own(os.path.dirname(path), stat.S_IFDIR) or not _is_own(path, stat.S_IFREG):
                continue
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(lock.fileno()).st_mtime > _ABANDONED_S:
                    shutil.rmtree(os.path.dirname(path), ignore_errors=True)


def _is_own(path: str, kind: int) -> bool:
    """This user's, and a directory or file itself, not a link to one."""
    found = os.lstat(path)
    return stat.S_IFMT(found.st_mode) == kind and found.st_uid == os.geteuid()


def _wait_for_end_of(driver: int) -> None:
    """Until it asks, through the standard input, or is gone, however that came about."""
    try:
        pidfd = os.pidfd_open(driver)
    except OSError:  # not allowed here, or gone already
        pidfd = None
    watched = [sys.stdin.fileno()] if pidfd is None else [sys.stdin.fileno(), pidfd]
    while os.getppid() == driver:
        if select.select(watched, [], [], 1.0 if pidfd is None else None)[0]:
            return


def _processes(directory: str, sessions: set[int]) -> Iterator[tuple[int, bool]]:
    """Living processes of the node, and whether they are Ray's. Daemons that somebody has started there, with sessions
    other than the node's, are left to themselves."""
    mark = f"{MARK}={directory}\0".encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as environ, open(f"/proc/{name}/cmdline", "rb") as cmdline:
                is_marked, command = mark in environ.read() + b"\0", cmdline.read()
            is_ray = command.startswith(b"ray::") or directory.encode() in command
            # Ray's agents write their titles over their environment, but have their logs open.
            is_of_node = is_marked or (is_ray and _has_open(name, directory))
            if is_of_node and command and (is_ray or os.getsid(int(name)) in sessions):
                yield int(name), is_ray
        except OSError:  # it has just ended, or is another user's
            continue


def _has_open(process: str, directory: str) -> bool:
    """A file below the directory."""
    place = f"/proc/{process}/fd"
    return any(os.readlink(f"{place}/{name}").startswith(directory + os.sep) for name in os.listdir(place))


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
