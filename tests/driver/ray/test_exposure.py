"""Access of other users and hosts to a run: the node's directory and its ports."""

import os
import socket
import stat
import sys
from pathlib import Path

import pytest
from models import Regression, RegressionData

import raylit as pl
from raylit.driver.ray import local_cluster
from raylit.driver.ray.rendezvous import Rendezvous

_LISTENING = "0A"
_LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, the same as an IPv6 address, and ::1, as the kernel writes them."""

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def is_reachable(ip, port):
    try:
        socket.create_connection((ip, port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def own_ip():
    """Return the address of an interface other than the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this host has no network but the loopback")
        ip = probe.getsockname()[0]
    if ip.startswith("127."):
        pytest.skip("this host has no network but the loopback")
    return ip


def descendants(pid):
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                parents[int(name)] = int(Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def listening(pids):
    """Return the addresses on which these processes listen, in the kernel's notation, by process name."""
    addresses = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING:
                addresses[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    found = {}
    for pid in pids:
        try:
            for entry in Path("/proc", str(pid), "fd").iterdir():
                if (address := addresses.get(os.readlink(entry))) is not None:
                    found.setdefault(Path("/proc", str(pid), "comm").read_text().strip(), set()).add(address)
        except OSError:
            continue
    return found


@needs_proc
def test_the_embedded_node_listens_on_loopback_only(quiet):
    pl.Trainer(num_workers=2, max_epochs=1, **quiet).fit(Regression(), RegressionData())
    found = listening(descendants(os.getpid()))
    assert {"gcs_server", "raylet"} <= found.keys()
    assert any(name.startswith("ray::WorkerActo") for name in found)
    assert {name: addresses - _LOOPBACK for name, addresses in found.items() if addresses - _LOOPBACK} == {}


@needs_proc
def test_other_users_cannot_open_the_embedded_nodes_directory(quiet):
    pl.Trainer(num_workers=2, max_epochs=1, **quiet).fit(Regression(), RegressionData())
    assert local_cluster.is_embedded()
    directories = list(Path(os.environ["RAY_TMPDIR"]).glob("rl-*"))
    assert any(list(directory.rglob("sockets/raylet*")) for directory in directories)
    for directory in directories:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert directory.stat().st_uid == os.geteuid()


def test_the_store_of_local_workers_is_reachable_from_this_host_only():
    ip = own_ip()
    rendezvous = Rendezvous(driver_ip=ip, worker_ips=[ip, ip])
    info = rendezvous.next_info()
    assert info.host == "127.0.0.1"
    assert is_reachable("127.0.0.1", info.port)
    assert not is_reachable(ip, info.port)


def test_the_store_of_remote_workers_listens_on_the_nodes_address_only():
    ip = own_ip()
    rendezvous = Rendezvous(driver_ip=ip, worker_ips=[ip, "192.0.2.7"])
    info = rendezvous.next_info()
    assert info.host == ip
    assert is_reachable(ip, info.port)
    assert not is_reachable("127.0.0.1", info.port)


def test_a_temporary_directory_too_long_for_sockets_is_a_named_error(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("a" * 90)))
    with pytest.raises(pl.ConfigError, match="are possible, as Ray"):
        local_cluster._choose_parent_directory()
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/below")
    with pytest.raises(pl.ConfigError, match="RAY_TMPDIR=/dev/null/below"):
        local_cluster._choose_parent_directory()
