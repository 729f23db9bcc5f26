"""Rendezvous: the store in the driver where the ranks find each other, a prefix for each generation of the group."""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

_GROUP_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the ranks of one generation meet."""

    host: str
    port: int
    generation: int

    def join(self, *, rank: int, world_size: int, backend: str, own_ip: str) -> None:
        """Form the default process group. Collective; called in the worker."""
        interface = _interface_of(own_ip)
        if interface is not None:
            # gloo takes the interface that the host's name resolves to, which fails where that is a loopback address.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        store = dist.TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=60))
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"g{self.generation}", store),
            rank=rank,
            world_size=world_size,
            timeout=_GROUP_TIMEOUT,
        )


class Rendezvous:
    """The store, on a free port of the driver's host: it does not matter then which worker dies."""

    def __init__(self, *, host: str) -> None:
        self._host = host
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._generation = 0

    def next_meeting(self) -> Meeting:
        self._generation += 1
        return Meeting(host=self._host, port=self._store.port, generation=self._generation)


def _interface_of(ip: str) -> str | None:
    """The network interface that holds an IPv4 address; None where that cannot be told."""
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


_SIOCGIFADDR = 0x8915
