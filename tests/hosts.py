"""Hosts for a test: network namespaces of this machine, each with its own Ray node and /tmp."""

import contextlib
import os
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
NETCLUSTER = CHECKOUT.parent / "shared" / "netcluster"
DEADLINE_S = 100


@contextlib.contextmanager
def start_hosts(tmp_path, **options):
    """Start hosts that see `tmp_path`; the end of the context, or of this process, ends all that runs on them."""
    if not NETCLUSTER.is_dir():
        pytest.skip(f"needs {NETCLUSTER}")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2, to make hosts out of network namespaces")
    sys.path.insert(0, str(NETCLUSTER))
    from netcluster import NetCluster

    share = [path for path in (str(CHECKOUT), sys.prefix, str(tmp_path)) if path.startswith("/tmp/")]
    with NetCluster(share=share, **options) as cluster:
        yield cluster


def run_on_first_host(cluster, source, tmp_path, **environment):
    """Run a script on the first host and return what it prints; its /tmp is its own."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    variables = {"RAY_ADDRESS": cluster.address, **environment}
    job = cluster.popen(0, [sys.executable, str(script)], env=variables, cwd="/tmp")
    try:
        assert job.wait(DEADLINE_S) == 0, job.output
    finally:
        if job.returncode is None:
            job.kill()
    return job.output


def run_on_two_hosts(source, tmp_path, *, detect="default"):
    """Run a script on the first of two hosts and return what it prints."""
    with start_hosts(tmp_path, hosts=2, cpus_per_host=1, detect=detect) as cluster:
        return run_on_first_host(cluster, source, tmp_path)
