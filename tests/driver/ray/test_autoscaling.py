"""Runs on a cluster that Ray's own autoscaler enlarges and reduces: what is waited for, refused, withdrawn and freed.

`ray status` is asked for the demands, as a user would. Each script has a cluster and a process of its own.
"""

import os
import pathlib
import shutil
import tempfile

import pytest

from raylit.compat.ray_core import AutoscalerLimits, NodeType
from raylit.config import Workers
from raylit.driver.ray.placement import Host, ResourceRequest, list_hosts_at_most

TESTS = pathlib.Path(__file__).parents[2]
SCALING = TESTS.parents[1] / "shared" / "autoscaling"

PREAMBLE = """
import contextlib, io, os, re, signal, subprocess, sys, threading, time
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
import ray
import raylit as pl
from fake_cluster import FakeAutoscalingCluster
from models import Regression, RegressionData
from raylit.compat import ray_core

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)

@contextlib.contextmanager
def connect(**nodes):
    with FakeAutoscalingCluster(**nodes) as cluster, contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)  # before the cluster goes: Ray would look for it for a minute
        ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)
        wait_until(lambda: ray_core.read_autoscaling() is not None, "the autoscaler has reported")
        yield cluster

def wait_until(is_true, what, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.5)

def fit(**arguments):
    '''Return the trainer, the lines on stderr and the seconds that it took.'''
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, **arguments})
    started = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        trainer.fit(Regression(), RegressionData())
    return trainer, printed.getvalue().splitlines(), time.monotonic() - started

def count_nodes():
    return sum(node["Alive"] for node in ray.nodes())

def read_demands(cluster):
    '''Return what `ray status` says under its last heading.'''
    command = ["ray", "status", "--address", cluster.address]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return text.partition("Pending Demands:")[2].strip() or text

def check_nothing_is_left(cluster, *, num_others=0):
    states = [entry["state"] for entry in ray.util.placement_group_table().values()]
    assert set(states) <= {"CREATED", "REMOVED"} and states.count("CREATED") == num_others, states
    wait_until(lambda: read_demands(cluster) == "(no resource demands)", "ray status shows no demand")
"""


@pytest.fixture
def run_scaled(run_script, monkeypatch):
    """Run a script on a cluster with an autoscaler; skip where it cannot be played."""
    if not (SCALING / "fake_cluster.py").is_file():
        pytest.skip(f"needs {SCALING}")
    directory = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", directory)
    # The checkout first: another one may be installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS.parent, TESTS, SCALING))))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    yield lambda source: run_script(PREAMBLE + source, timeout_s=270)
    shutil.rmtree(directory, ignore_errors=True)


SCALED_UP = """
with connect(head={"CPU": 2}, workers={"cpu2": ({"CPU": 2}, 3)}) as cluster:
    trainer, lines, took_s = fit(num_workers=8, keep_workers_s=3, start_timeout_s=200)
    assert (trainer.world_size, count_nodes()) == (8, 4)
    since = r"raylit: waiting since [\\d:]{8} \\(\\d+ s\\) for 8 workers of 1 CPU each; "
    line = since + r"free now: \\d CPU of \\d hosts? with \\d CPU; the autoscaler .*"
    assert re.fullmatch(line, lines[0]), lines
    # Then every ten seconds, also where no terminal shows it.
    waits = [line for line in lines if "workers of 1 CPU" in line]
    assert len(waits) <= 1 + took_s / 10, lines

    # The trainer with its results, and the connection, stay.
    wait_until(lambda: count_nodes() == 1, "the idle nodes are gone", 90)
    check_nothing_is_left(cluster)
    print("through")
"""


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_workers_start_once_the_autoscaler_has_added_their_nodes_which_go_after_the_workers(run_scaled):
    assert "through" in run_scaled(SCALED_UP)


WITHDRAWN = """
with connect(head={"CPU": 2}, workers={"cpu2": ({"CPU": 2}, 2)}) as cluster:
    # It keeps what follows from being placed, however many nodes come.
    others = ray.util.placement_group([{"CPU": 2}])
    assert others.wait(60)

    for arguments, message in (
        ({"num_workers": 7}, "room for 6 such workers, on 3 hosts with 6 CPU"),
        ({"num_workers": 1, "resources_per_worker": {"CPU": 64}}, "at most (2 cpu2 of 2 CPU) there is room for 0 such"),
        ({"num_workers": 4, "placement": "STRICT_SPREAD"}, "room for 3 such workers"),
    ):
        try:
            fit(**arguments)
        except pl.ResourcesError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"it was placed: {arguments}")
    check_nothing_is_left(cluster, num_others=1)
    assert count_nodes() == 1

    large = {"num_workers": 3, "resources_per_worker": {"CPU": 2}, "keep_workers_s": 0}
    try:
        fit(**large, start_timeout_s=1)
    except pl.ResourcesError as error:
        assert "not placed within start_timeout_s=1" in str(error), error
    else:
        raise AssertionError("it was placed")
    check_nothing_is_left(cluster, num_others=1)

    handler = signal.getsignal(signal.SIGINT)
    threading.Timer(2, os.kill, [os.getpid(), signal.SIGINT]).start()
    started = time.monotonic()
    try:
        fit(**large)
    except KeyboardInterrupt:
        assert time.monotonic() - started < 30
    else:
        raise AssertionError("it was placed")
    assert signal.getsignal(signal.SIGINT) == handler
    check_nothing_is_left(cluster, num_others=1)

    source = "import sys, ray, raylit as pl; from models import *; ray.init(sys.argv[1]);"
    source += "pl.fit(Regression(), RegressionData(), num_workers=3, resources_per_worker={'CPU': 2}, logger=False)"
    command = [sys.executable, "-c", source, cluster.address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as other:
        try:
            assert any("raylit: waiting since" in line for line in other.stderr)
            other.send_signal(signal.SIGINT)
            assert other.wait(30) == -signal.SIGINT, other.stderr.read()
        finally:
            other.kill()
    check_nothing_is_left(cluster, num_others=1)
    wait_until(lambda: count_nodes() == 1, "nodes that nothing uses are gone", 90)
    print("through")
"""


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_refused_late_or_interrupted_run_leaves_no_demand(run_scaled):
    assert "through" in run_scaled(WITHDRAWN)


OTHERS = """
from raylit.driver.ray import placement

placement._INFEASIBLE_S = 2.0
with connect(head={"CPU": 1}, workers=WORKERS) as cluster:
    others = ray.util.placement_group([{"CPU": 2}])
    assert others.wait(60)
    assert count_nodes() == 2
    # The request is for all nodes that the cluster may have, while the other group holds one of the two.
    waiting = threading.Event()
    def free():
        wait_until(lambda: ray_core.read_autoscaling().infeasible_groups, "the autoscaler finds it infeasible")
        time.sleep(5)
        waiting.set()
        ray.util.remove_placement_group(others)
    freeing = threading.Thread(target=free)
    freeing.start()
    trainer, lines, _ = fit(num_workers=2, resources_per_worker={"CPU": 2}, keep_workers_s=0, start_timeout_s=120)
    freeing.join()
    assert waiting.is_set() and trainer.world_size == 2
    assert "the nodes it may still start are too few" in lines[0], lines
    check_nothing_is_left(cluster)
    print("through")
"""


@pytest.mark.cluster
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "workers",
    [
        pytest.param({"cpu2": ({"CPU": 2}, 2)}, id="known limits"),
        # A type that does not say what it has, as for hosts of one's own: what it may add is unknown.
        pytest.param({"cpu2": ({"CPU": 2}, 2), "own": ({}, 1)}, id="unknown limits"),
    ],
)
def test_a_request_waits_while_others_hold_nodes_of_a_cluster_at_its_limit(run_scaled, workers):
    assert "through" in run_scaled(f"WORKERS = {workers!r}\n{OTHERS}")


def limits(*types, max_nodes=8):
    node_types = tuple(
        NodeType(name=f"type{index}", resources=resources, labels={}, max_count=count)
        for index, (resources, count) in enumerate(types)
    )
    return AutoscalerLimits(node_types=node_types, max_nodes=max_nodes, node_ids=frozenset())


@pytest.mark.parametrize(
    ("most", "each", "count"),
    [
        (limits(({"CPU": 2.0}, 3)), {"CPU": 1.0}, 1 + 6),
        (limits(({"CPU": 2.0}, 3), max_nodes=2), {"CPU": 1.0}, 1 + 4),
        (limits(({"CPU": 2.0}, 3), ({"CPU": 8.0, "GPU": 4.0}, 1), max_nodes=2), {"CPU": 1.0}, 1 + 8 + 2),
        (limits(({"CPU": 2.0}, 3), ({"CPU": 8.0, "GPU": 4.0}, 1), max_nodes=1), {"GPU": 1.0}, 4),
        (limits(), {"CPU": 1.0}, 1),
    ],
)
def test_the_largest_cluster_has_the_nodes_that_serve_a_request_best(most, each, count):
    request = ResourceRequest(workers=Workers(num_workers=2), each=each)
    head = Host(resources={"CPU": 1.0}, labels={})
    assert request.num_fitting(list_hosts_at_most(request, most, [head])) == count
