"""Node reaper: a process that removes what the embedded node leaves once the driver asks for it or is gone.

It runs as a file with the standard library alone: it needs some MB, and outlives a driver that is killed.
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
"""Name of an environment variable of the embedded node's processes; its value is the node's directory."""

PREFIX = "rl-"
"""Prefix of the name of a node's directory."""
SESSIONS = "raylit.sessions"
"""File in the node's directory with the session ids of the node's processes, one per line."""

_LOCK = "raylit.lock"
"""File in the node's directory, locked by the node reaper for as long as it lives."""
_ABANDONED_S = 60.0
"""Minimum age of an unlocked directory before it is removed: a younger one may be about to be locked."""
_SELF_EXIT_S = 3.0
"""Time for processes other than Ray's to end: multiprocessing's resource tracker still has shared memory to remove."""
_MAX_EXIT_S = 10.0
_PERIOD_S = 0.05


class NodeReaper:
    """Handle in the driver of the process that removes an embedded node's processes and directory.

    Linux only: elsewhere there is no /proc in which to find the processes.
    """

    def __init__(self, directory: str) -> None:
        """Start the reaper; it removes `directory` with its contents once no process of the node is left."""
        lock = os.open(os.path.join(directory, _LOCK), os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), directory],
            stdin=subprocess.PIPE,
            pass_fds=[lock],
            # A Ctrl-C in the terminal, or a signal to the driver's group, must not reach it.
            start_new_session=True,
            cwd="/",
        )
        os.close(lock)

    def finish(self) -> None:
        """Remove the node now; returns when that is done."""
        assert self._process.stdin is not None
        # A byte, not the end of the pipe: a fork of the driver may have the pipe open as well.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_SELF_EXIT_S + _MAX_EXIT_S)


def _run_reaper(driver: int, directory: str) -> None:
    session = os.getsid(driver) if os.getppid() == driver else 0
    _remove_abandoned(os.path.dirname(directory))
    _wait_for_driver_end(driver)
    started_s = time.monotonic()
    while (waited_s := time.monotonic() - started_s) < _MAX_EXIT_S:
        processes = list(_find_processes(directory, {session, *_read_sessions(directory)}))
        for pid, is_ray in processes:
            if is_ray or waited_s > _SELF_EXIT_S:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if not processes:
            break
        time.sleep(_PERIOD_S)
    shutil.rmtree(directory, ignore_errors=True)


def _read_sessions(directory: str) -> list[int]:
    try:
        with open(os.path.join(directory, SESSIONS)) as lines:
            return [int(line) for line in lines]
    except OSError:  # the node had not started its processes yet
        return []


def _remove_abandoned(parent: str) -> None:
    """Remove directories of nodes that were killed together with their reapers, as job managers and containers do.

    The directory for temporary files is shared: only directories with the node's prefix that belong to this user are
    looked at.
    """
    for path in glob.glob(os.path.join(glob.escape(parent), f"{PREFIX}*", _LOCK)):
        with contextlib.suppress(OSError):
            if not _is_owned(os.path.dirname(path), stat.S_IFDIR) or not _is_owned(path, stat.S_IFREG):
                continue
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(lock.fileno()).st_mtime > _ABANDONED_S:
                    shutil.rmtree(os.path.dirname(path), ignore_errors=True)


def _is_owned(path: str, kind: int) -> bool:
    """Return True if the path is this user's, and of this kind itself, not a link."""
    status = os.lstat(path)
    return stat.S_IFMT(status.st_mode) == kind and status.st_uid == os.geteuid()


def _wait_for_driver_end(driver: int) -> None:
    """Wait until the driver asks through the standard input, or is gone."""
    try:
        pidfd = os.pidfd_open(driver)
    except OSError:  # not permitted here, or already gone
        pidfd = None
    watched = [sys.stdin.fileno()] if pidfd is None else [sys.stdin.fileno(), pidfd]
    while os.getppid() == driver:
        if select.select(watched, [], [], 1.0 if pidfd is None else None)[0]:
            return


def _find_processes(directory: str, sessions: set[int]) -> Iterator[tuple[int, bool]]:
    """Yield the living processes of the node with a flag that tells whether they are Ray's.

    Daemons that users have started there, in sessions other than the node's, are left alone.
    """
    mark = f"{MARK}={directory}\0".encode()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as environ, open(f"/proc/{name}/cmdline", "rb") as cmdline:
                is_marked, command = mark in environ.read() + b"\0", cmdline.read()
            is_ray = command.startswith(b"ray::") or directory.encode() in command
            # Ray's agents overwrite their environment with their titles, but have their logs open.
            is_of_node = is_marked or (is_ray and _has_open_file(name, directory))
            if is_of_node and command and (is_ray or os.getsid(int(name)) in sessions):
                yield int(name), is_ray
        except OSError:  # it has just ended, or is another user's
            continue


def _has_open_file(process: str, directory: str) -> bool:
    """Return True if the process has a file below the directory open."""
    descriptors = f"/proc/{process}/fd"
    return any(os.readlink(f"{descriptors}/{name}").startswith(directory + os.sep) for name in os.listdir(descriptors))


if __name__ == "__main__":
    _run_reaper(int(sys.argv[1]), sys.argv[2])
