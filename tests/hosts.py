"""Two hosts for a test: network namespaces of this machine, each with its own Ray node and /tmp."""

import os
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
NETCLUSTER = CHECKOUT.parent / "shared" / "netcluster"
DEADLINE_S = 100


def run_on_two_hosts(source, tmp_path, *, detect="default"):
    """What a script on the first of two hosts prints; its /tmp is its own."""
    if not NETCLUSTER.is_dir():
        pytest.skip(f"needs {NETCLUSTER}")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2, to make hosts out of network namespaces")
    sys.path.insert(0, str(NETCLUSTER))
    from netcluster import NetCluster

    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(source))
    share = [path for path in (str(CHECKOUT), sys.prefix, str(tmp_path)) if path.startswith("/tmp/")]
    with NetCluster(hosts=2, cpus_per_host=1, share=share, detect=detect) as cluster:
        job = cluster.popen(0, [sys.executable, str(script)], env={"RAY_ADDRESS": cluster.address}, cwd="/tmp")
        assert job.wait(DEADLINE_S) == 0, job.output
        return job.output
