"""Facts about one host, for `raylit doctor`, from Python's standard library alone. Runs on every host of a cluster.

The class is pickled by value, so that it also runs on hosts that lack raylit or torch, or have other versions of them.
"""

import importlib.metadata
import importlib.util
import os
import platform
import socket
import time
from typing import Any

PACKAGES = ("ray", "torch", "raylit")
"""Packages whose versions must be the same on all hosts."""

_SHARED_MEMORY = "/dev/shm"
_SIOCGIFADDR = 0x8915


class HostProbe:
    """Ray actor on one host."""

    def examine(self, ip: str) -> dict[str, Any]:
        """Return the host's name, versions, network interface and limits, as plain values by name.

        Args:
            ip: The address under which Ray knows the host.
        """
        return {
            "host": socket.gethostname(),
            "interface": os.environ.get("GLOO_SOCKET_IFNAME") or find_interface(ip),
            "interfaces": [name for _, name in socket.if_nameindex()],
            "versions": {"python": platform.python_version(), **{name: _find_version(name) for name in PACKAGES}},
            **_measure_shared_memory(),
            "open_files": _read_open_file_limit(),
        }

    def read_clock(self) -> float:
        """Return this host's time, in seconds since 1970."""
        return time.time()


def find_interface(ip: str) -> str | None:
    """Return the network interface that has an IPv4 address, or None if unknown."""
    try:
        import fcntl
    except ImportError:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = name.encode()[:15].ljust(40, b"\0")
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == ip:
                return name
    return None


def _find_version(package: str) -> str:
    """Return the version of an installed package; "none" without it, "unknown" if it is only on the import path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none" if importlib.util.find_spec(package) is None else "unknown"


def _measure_shared_memory() -> dict[str, int | None]:
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except (AttributeError, OSError):
        return {"shm_bytes": None, "shm_free_bytes": None}
    return {
        "shm_bytes": status.f_blocks * status.f_frsize,
        "shm_free_bytes": status.f_bavail * status.f_frsize,
    }


def _read_open_file_limit() -> int | None:
    """Return how many files a worker's process may have open, or None if unknown or unlimited."""
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft
