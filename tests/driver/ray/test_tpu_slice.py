"""Workers on TPU slices that Ray nodes of this machine pretend to be: reservation, ranks, variables, replacement."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import ray

from raylit.driver.ray import local_cluster
from raylit.driver.ray.tpu_slice import wait_for_exits

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SCRIPT = """
    import json, os, pathlib, signal, sys
    import ray
    import raylit as pl
    from models import Regression, RegressionData
    from raylit.accelerators import CPUAccelerator
    from ray.util.tpu import slice_placement_group
    from tpu_hosts import add_slice, start_cluster

    class Chip(CPUAccelerator):
        name = "chip"
        is_host = False
        is_on_tpu = True
        resources = {"TPU": 1.0}

        def process_variables(self, place):
            return {} if place is None else {"PLACE": f"{place.rank} {place.local_rank} {place.slice_id}"}

    NAMES = ("TPU_NAME", "TPU_WORKER_ID", "PLACE", "RANK", "LOCAL_RANK")

    class Model(Regression):
        def __init__(self, tag, victim=None):
            super().__init__()
            self.tag, self.victim = tag, victim

        def on_fit_start(self):
            pids = pathlib.Path("pids")
            pids.mkdir(exist_ok=True)
            old = [path.name for path in pids.iterdir() if not path.name.startswith(self.tag)]
            facts = {name: value for name, value in os.environ.items() if name in NAMES or name.startswith("MEGASCALE")}
            facts["running"] = [pid for pid in old if os.path.exists(f"/proc/{pid.split('-')[1]}")]
            (pids / f"{self.tag}-{os.getpid()}").touch()
            print(json.dumps({"tag": self.tag, "global_rank": self.trainer.global_rank, **facts}), flush=True)

        def on_train_start(self):
            if self.trainer.global_rank == self.victim:
                os.kill(os.getpid(), signal.SIGKILL)

    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    cluster = start_cluster()
    try:
        ray.init(address=cluster.address, log_to_driver=False)

        def fit(tag, victim=None, **arguments):
            trainer = pl.Trainer(accelerator=Chip(), max_epochs=1, **arguments, **quiet)
            trainer.fit(Model(tag, victim), RegressionData())

        def refuse(tag, **arguments):
            try:
                fit(tag, **arguments)
            except (pl.ConfigError, pl.ResourcesError, pl.WorkerDied) as error:
                print(json.dumps({"tag": tag, "error": f"{type(error).__name__}: {error}"}), flush=True)

        refuse("none", tpu_cores=4)
        add_slice(cluster, "pod", topology="2x2", num_cores=4, hosts=2, chips=2)
        for name in ("alone-a", "alone-b"):
            add_slice(cluster, name, topology="1x1", num_cores=1, hosts=1, chips=1)
        cluster.wait_for_nodes()
        refuse("dies", victim=2, num_workers=4)
        fit("pod", topology="2x2")
        pl.shutdown()
        left = [p.name for p in pathlib.Path("pids").iterdir() if os.path.exists(f"/proc/{p.name.split('-')[1]}")]
        print(json.dumps({"tag": "left", "pids": left}), flush=True)
        fit("alone", topology="1x1", num_workers=2)
        refuse("three", num_workers=3)
        pl.shutdown()
        other = slice_placement_group(topology="2x2", accelerator_version="v6e", chips_per_vm=2)
        refuse("taken", topology="2x2", start_timeout_s=3)
        other.shutdown()
    finally:
        pl.shutdown()
        ray.shutdown()
        cluster.shutdown()
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What the workers and the driver of one script have printed, by the run's tag."""
    directory = tmp_path_factory.mktemp("slices")
    script = directory / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    tests = Path(__file__).parents[2]
    paths = [str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines() if "{" in line]
    by_tag = {}
    for line in lines:
        by_tag.setdefault(line.pop("tag"), []).append(line)
    return by_tag


def test_ranks_follow_the_hosts_of_the_slice(facts):
    """Its hosts have registered in the other order, and the bundles of a placement group have one of their own."""
    workers = sorted(facts["pod"], key=lambda worker: worker["global_rank"])
    assert [worker["TPU_WORKER_ID"] for worker in workers] == ["0", "0", "1", "1"]
    assert {worker["TPU_NAME"] for worker in workers} == {"pod"}


def test_a_process_starts_with_its_place(facts):
    workers = sorted(facts["pod"], key=lambda worker: worker["global_rank"])
    assert [worker["PLACE"] for worker in workers] == ["0 0 0", "1 1 0", "2 0 0", "3 1 0"]
    assert [(worker["RANK"], worker["LOCAL_RANK"]) for worker in workers] == [*zip("0123", "0101", strict=True)]
    assert not any(name.startswith("MEGASCALE") for worker in workers for name in worker)


def test_several_slices_know_their_coordinator(facts):
    workers = sorted(facts["alone"], key=lambda worker: worker["global_rank"])
    assert [worker["MEGASCALE_SLICE_ID"] for worker in workers] == ["0", "1"]
    assert {worker["TPU_NAME"] for worker in workers} == {"alone-a", "alone-b"}
    assert {worker["MEGASCALE_NUM_SLICES"] for worker in workers} == {"2"}
    assert {worker["MEGASCALE_PORT"] for worker in workers} == {"8081"}
    assert len({worker["MEGASCALE_COORDINATOR_ADDRESS"] for worker in workers}) == 1


def test_a_replacement_starts_when_the_old_processes_are_gone(facts):
    [death] = facts["dies"][-1:]
    assert death["error"].startswith("WorkerDied: worker of rank 2")
    assert len(facts["dies"]) == 5  # four workers and the driver
    assert [worker["running"] for worker in facts["pod"]] == [[], [], [], []]


def test_chips_are_free_when_the_workers_have_been_ended(facts):
    assert facts["left"] == [{"pids": []}]


def test_the_wait_for_an_exit_ends_with_the_process(capsys):
    local_cluster.connect()
    node_id = ray.get_runtime_context().get_node_id()
    process = subprocess.Popen(["sleep", "60"])
    try:
        wait_for_exits([(node_id, process.pid)], timeout_s=0.2)
        assert f"still hold their TPU chips, processes [{process.pid}]" in capsys.readouterr().err
        threading.Timer(0.5, process.kill).start()  # a zombie then, which holds nothing
        wait_for_exits([(node_id, process.pid)], timeout_s=60)
        assert capsys.readouterr().err == ""
    finally:
        process.kill()
        process.wait()


def test_a_part_of_a_slice_is_refused(facts):
    [refusal] = facts["three"]
    assert "num_workers=3: a slice is used as a whole" in refusal["error"]
    assert "1 slice v6e 2x2 (2 hosts with 2 chips each)" in refusal["error"]
    assert "2 slices v6e 1x1 (a host with 1 chip)" in refusal["error"]


def test_a_cluster_without_tpus_says_what_it_has(facts):
    [refusal] = facts["none"]
    assert "there is no TPU in this cluster of 1 host with 1 CPU" in refusal["error"]
    assert "RAY_ADDRESS" in refusal["error"]


def test_a_slice_that_others_hold_is_waited_for(facts):
    [refusal] = facts["taken"]
    assert refusal["error"].startswith("ResourcesError: 1 TPU slice(s) v6e 2x2")
    assert "not free within start_timeout_s=3" in refusal["error"]
