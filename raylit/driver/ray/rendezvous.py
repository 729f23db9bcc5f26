"""Rendezvous of the ranks: a TCP store in the driver, with a prefix for each generation of the group."""

import errno
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from raylit.driver.ray.host_probe import find_interface

_GROUP_TIMEOUT = timedelta(minutes=30)
_LOOPBACK = "127.0.0.1"
_BACKLOG = 4096
"""Queue length for all ranks that connect at once; the kernel lowers it to its own limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RendezvousInfo:
    """Address of the store and generation of the group to form."""

    host: str
    port: int
    generation: int

    def join(self, *, rank: int, world_size: int, backend: str, own_ip: str) -> None:
        """Form the default process group. Collective; called in the worker."""
        interface = find_interface(_LOOPBACK if self.host == _LOOPBACK else own_ip)
        if interface is not None:
            # gloo uses the interface that the host's name resolves to, which fails if that is a loopback address.
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
    """TCP store of the rendezvous, on a free port of the driver's host, so that it survives any worker.

    Neither the store nor gloo authenticates connections, and objects that ranks send each other are unpickled. So both
    listen on the loopback interface alone if all workers are on the driver's host, otherwise on the nodes' addresses.
    """

    def __init__(self, *, driver_ip: str, worker_ips: Iterable[str]) -> None:
        self._host = _LOOPBACK if set(worker_ips) == {driver_ip} else driver_ip
        with _listen(self._host) as listener:
            port = listener.getsockname()[1]
            self._store = dist.TCPStore(
                self._host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        self._generation = 0

    def next_info(self) -> RendezvousInfo:
        self._generation += 1
        return RendezvousInfo(host=self._host, port=self._store.port, generation=self._generation)


def _listen(host: str) -> socket.socket:
    """Return a socket on a free port of this address alone; torch's own would listen on all interfaces."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        # The node's address is translated on the way to it, as for a container.
        return socket.create_server(("", 0), family=family, backlog=_BACKLOG)
