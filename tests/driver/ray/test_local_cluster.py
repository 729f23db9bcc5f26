"""Runs on clusters that the user provides: several hosts, an autoscaler, Tune. Each runs in a process of its own."""

import os
import pathlib
import shutil
import tempfile

import pytest

TESTS = pathlib.Path(__file__).parents[2]
SHARED = TESTS.parents[1] / "shared"

PREAMBLE = """
import os, sys, time
import ray, torch
import raylit as pl
from raylit.compat import ray_core
from raylit.driver.ray import placement
from raylit.driver.ray.placement import Placement
from raylit.config import Workers

def refusal(**workers):
    started = time.monotonic()
    try:
        Placement(Workers(**workers)).remove()
    except pl.ResourcesError as error:
        return str(error), time.monotonic() - started
    raise AssertionError("it was placed")

def waiting_groups():
    table = ray.util.placement_group_table().values()
    return [entry["state"] for entry in table if entry["state"] not in ("REMOVED", "CREATED")]
"""


@pytest.fixture
def own_ray(monkeypatch):
    """Run scripts with a Ray of their own that finds the tests' modules."""
    directory = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", directory)
    # The checkout first: another one may be installed.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS.parent, TESTS, SHARED / "autoscaling"))))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    yield monkeypatch
    shutil.rmtree(directory, ignore_errors=True)


HOSTS = (
    PREAMBLE
    + """
from ray.cluster_utils import Cluster

def hosts(**workers):
    room = Placement(Workers(**workers))
    table = ray.util.placement_group_table(room._group)["bundles_to_node_id"]
    room.remove()
    return [table[index] for index, _ in room._bundles]

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "labels": {"zone": "a"}})
cluster.add_node(num_cpus=2, labels={"zone": "b"}, resources={"disk": 3})
ray.init(address=cluster.address, logging_level="WARNING")
cluster.wait_for_nodes()
zones = {node["NodeID"]: node["Labels"]["zone"] for node in ray.nodes()}

class Where(pl.LightningModule):
    def predict_step(self, batch, batch_idx):
        return self.global_rank, zones[ray.get_runtime_context().get_node_id()]

    def configure_optimizers(self): ...

quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer = pl.Trainer(num_processes=2, num_nodes=2, keep_workers_s=0, **quiet)
outputs = trainer.predict(Where(), torch.utils.data.DataLoader(torch.zeros(4, 1)))
assert sorted(outputs) == [(0, "a"), (1, "a"), (2, "b"), (3, "b")], outputs

zones_of = lambda **workers: sorted(zones[node] for node in hosts(**workers))
small = {"CPU": 0.5}
assert zones_of(num_workers=4, num_nodes=2, resources_per_worker=small) == ["a", "a", "b", "b"]
assert len(set(zones_of(num_workers=4, placement="STRICT_PACK", resources_per_worker=small))) == 1
assert zones_of(num_workers=2, placement="STRICT_SPREAD") == ["a", "b"]
assert zones_of(num_workers=2, label_selector={"zone": "b"}) == ["b", "b"]
assert zones_of(num_workers=2, label_selector={"zone": "!b"}) == ["a", "a"]
assert zones_of(num_workers=2, resources_per_worker={"disk": 1.5}) == ["b", "b"]
assert len(zones_of(num_workers=6)) == 6  # more than cores: they share

assert ray_core.read_autoscaling() is None
for workers, words in [
    (dict(num_workers=3, num_nodes=3), "1 worker of 1 CPU each on each of 3 hosts"),
    (dict(num_workers=3, placement="STRICT_SPREAD"), "on 3 different hosts"),
    (dict(num_workers=1, resources_per_worker={"CPU": 3}), "this cluster of 2 hosts with 4 CPU, 3 disk can never"),
    (dict(num_workers=2, label_selector={"zone": "c"}), "with the labels {'zone': 'c'}"),
]:
    text, took_s = refusal(**workers)
    assert words in text, text
    assert took_s < 60, took_s
assert waiting_groups() == []

@ray.remote(num_cpus=1)
def in_a_task(**workers):
    return refusal(**workers)
text, took_s = ray.get(in_a_task.remote(num_workers=4, resources_per_worker={"CPU": 1}))
assert "holds 1 CPU itself, which its num_cpus=0 would leave" in text, text
assert took_s < 60, took_s
print("through")
ray.shutdown()
cluster.shutdown()
"""
)


@pytest.mark.cluster
def test_workers_are_placed_as_requested_on_several_hosts(own_ray, run_script):
    assert "through" in run_script(HOSTS)


AUTOSCALED = (
    PREAMBLE
    + """
import _thread, contextlib, io, re, threading
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
from fake_cluster import FakeAutoscalingCluster

def soon_without_demand():
    deadline = time.monotonic() + 20
    while ray_core.list_pending_groups() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ray_core.list_pending_groups()
    assert waiting_groups() == []

# A type of node that does not say what it has: only the autoscaler knows what no node can serve.
small = {"cpu2": ({"CPU": 2}, 2), "own": ({}, 1)}
with FakeAutoscalingCluster(head={"CPU": 1}, workers=small) as cluster, contextlib.ExitStack() as stack:
    stack.callback(ray.shutdown)  # before the cluster goes: Ray would look for it for a minute
    ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)
    deadline = time.monotonic() + 20
    while ray_core.read_autoscaling() is None and time.monotonic() < deadline:
        time.sleep(0.2)

    placement._INFEASIBLE_S = 2.0
    text, took_s = refusal(num_workers=1, resources_per_worker={"CPU": 64}, start_timeout_s=60)
    assert "1 worker of 64 CPU each is asked for" in text, text
    assert "its autoscaler says that no nodes it may start could" in text, text
    soon_without_demand()

    threading.Timer(1.5, _thread.interrupt_main).start()
    try:
        Placement(Workers(num_workers=1, resources_per_worker={"CPU": 64}))
    except KeyboardInterrupt:
        soon_without_demand()
    else:
        raise AssertionError("it was placed")

    with contextlib.redirect_stderr(io.StringIO()) as printed:
        started = time.monotonic()
        room = Placement(Workers(num_workers=2, resources_per_worker={"CPU": 2}, start_timeout_s=60))
    took_s = time.monotonic() - started
    assert len(ray.nodes()) == 3
    lines = printed.getvalue().splitlines()
    assert not lines or lines[0].startswith("raylit: waiting since"), lines
    # How many of its nodes have come by then differs.
    what = r".* for 2 workers of 2 CPU each; free now: \\d CPU of \\d hosts? with \\d CPU; (the autosc|others hold).*"
    assert not lines or re.fullmatch(what, lines[0]), lines
    assert len(lines) <= 1 + took_s / 10, lines
    room.remove()
    print("through", took_s, lines)
"""
)


@pytest.mark.cluster
def test_a_resource_request_waits_for_the_autoscaler_unless_it_is_infeasible(own_ray, run_script):
    if not (SHARED / "autoscaling" / "fake_cluster.py").is_file():
        pytest.skip("no shared/autoscaling beside the checkout")
    assert "through" in run_script(AUTOSCALED)


TUNED = (
    PREAMBLE
    + """
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
from ray import tune

def trial(config):
    from models import Regression, RegressionData

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer = pl.Trainer(num_workers=2, max_epochs=1, resources_per_worker={"CPU": 0.5}, **quiet)
    trainer.fit(Regression(), RegressionData())
    tune.report({"steps": trainer.global_step})

ray.init(num_cpus=2, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
# The whole cluster: a placement group in addition to the trial's would never fit.
room = tune.PlacementGroupFactory([{"CPU": 1}] + [{"CPU": 0.5}] * 2)
results = tune.Tuner(
    tune.with_resources(trial, room),
    run_config=tune.RunConfig(storage_path=os.getcwd(), verbose=0),
).fit()
assert [result.metrics["steps"] for result in results] == [3]
print("through")
ray.shutdown()
"""
)


@pytest.mark.cluster
def test_a_tune_trial_trains_in_the_trials_placement_group(own_ray, run_script):
    assert "through" in run_script(TUNED)


CALLED_OFTEN = """
import os, time
from pathlib import Path
import ray
from raylit.driver.ray import local_cluster

@ray.remote
class Actor:
    def call(self): ...

def parent(pid):
    return int(Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1])

def kilobytes(pid):
    return next(int(line.split()[1]) for line in Path("/proc", pid, "status").open() if line.startswith("VmRSS"))

local_cluster.connect()
actor = Actor.remote()
ray.get(actor.call.remote())
heads = [path.parent.name for path in Path("/proc").glob("[0-9]*/comm") if path.read_text() == "gcs_server\\n"]
(head,) = [pid for pid in heads if parent(pid) == os.getpid()]
before = kilobytes(head)
for _ in range(4):
    ray.get([actor.call.remote() for _ in range(1000)])
time.sleep(3)  # for what is reported once a second
print(kilobytes(head) - before)
local_cluster.shutdown()
"""


@pytest.mark.cluster
@pytest.mark.parametrize("own_setting", [None, "500"])
def test_the_embedded_node_records_no_task_events_unless_the_user_wants_it(own_setting, own_ray, run_script):
    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    own_ray.delenv("RAY_AUTH_MODE")
    if own_setting is not None:
        own_ray.setenv("RAY_task_events_report_interval_ms", own_setting)
    growth_kb = int(run_script(CALLED_OFTEN).splitlines()[-1])
    # 3.5 KB for each of 4000 calls.
    assert (growth_kb > 8000) == (own_setting is not None), growth_kb
