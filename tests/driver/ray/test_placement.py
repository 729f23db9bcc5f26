"""Placement of workers: meaning of a resource request, its wait, and existing placement groups of tasks and trials."""

import os
import pathlib
import signal
import threading
import time

import pytest
import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import raylit as pl
from raylit.compat import ray_core
from raylit.config import Workers
from raylit.driver.ray import local_cluster
from raylit.driver.ray.placement import Host, Placement, ResourceRequest, num_slots

TESTS = pathlib.Path(__file__).parents[2]


def demand(num_workers=2, each=None, **workers):
    return ResourceRequest(workers=Workers(num_workers=num_workers, **workers), each=each or {"CPU": 1.0})


def hosts(*cpus, **labels):
    return [Host(resources={"CPU": float(count)}, labels=labels) for count in cpus]


@pytest.mark.parametrize(
    ("unavailable", "offered", "fits"),
    [
        (demand(4), hosts(2, 2), True),
        (demand(4), hosts(2, 1), False),
        (demand(1, {"CPU": 4}), hosts(2, 2), False),
        (demand(2, {"CPU": 1, "GPU": 1}), hosts(8), False),
        (demand(3, {"CPU": 0.1}), hosts(0.3), True),
        (demand(4, num_nodes=2), hosts(3, 2), True),
        (demand(4, num_nodes=2), hosts(7, 1), False),
        (demand(3, placement="STRICT_PACK"), hosts(2, 2), False),
        (demand(3, placement="STRICT_PACK"), hosts(2, 3), True),
        (demand(3, placement="STRICT_SPREAD"), hosts(4, 4), False),
        (demand(2, placement="SPREAD"), hosts(2), True),
        (demand(2, label_selector={"zone": "a"}), hosts(2, zone="a"), True),
        (demand(2, label_selector={"zone": "a"}), hosts(2, zone="b"), False),
        (demand(2, label_selector={"zone": "!a"}), hosts(2), True),
        (demand(2, label_selector={"zone": "!a"}), hosts(2, zone="a"), False),
        (demand(2, label_selector={"zone": "in(a, b)"}), hosts(2, zone="b"), True),
        (demand(2, label_selector={"zone": "!in(a, b)"}), hosts(2, zone="b"), False),
    ],
)
def test_a_resource_request_fits_only_hosts_that_can_meet_it(unavailable, offered, fits):
    assert unavailable.fits(offered) is fits


@pytest.mark.parametrize(
    ("unavailable", "offered", "count"),
    [
        (demand(9), hosts(2, 3), 5),
        (demand(9, placement="STRICT_PACK"), hosts(2, 3), 3),
        (demand(9, placement="STRICT_SPREAD"), hosts(2, 3), 2),
        (demand(8, num_nodes=2), hosts(7, 2, 3), 6),
        (demand(8, num_nodes=2), hosts(7), 0),
    ],
)
def test_a_resource_request_counts_the_workers_that_fit(unavailable, offered, count):
    assert unavailable.num_fitting(offered) == count


def test_more_workers_than_fit_into_memory_are_an_error_with_the_number_that_fits():
    local_cluster.connect()
    memory = ray.cluster_resources()["memory"]
    expected = rf"num_workers=1000: there is memory for {int(memory // 200_000_000)} such workers"
    with pytest.raises(pl.ResourcesError, match=rf"{expected}.* resources_per_worker=\{{'memory': BYTES\}}"):
        Placement(Workers(num_workers=1000))
    with pytest.raises(pl.ResourcesError, match=r"1000 workers of 0.01 CPU, [\d.]+ GB of memory each"):
        Placement(Workers(num_workers=1000, resources_per_worker={"memory": memory}))
    Placement(Workers(num_workers=150, resources_per_worker={"memory": 0})).remove()
    assert unfinished_groups() == []


def test_workers_of_a_host_share_a_bundle_with_num_nodes():
    shared = demand(6, {"CPU": 0.1, "GPU": 1}, num_nodes=2)
    assert shared.bundles == [{"CPU": 0.3, "GPU": 3}] * 2
    assert shared.bundle_of_worker == [0, 0, 0, 1, 1, 1]
    assert shared.strategy == "STRICT_SPREAD"
    apart = demand(3, placement="SPREAD")
    assert (apart.bundles, apart.bundle_of_worker, apart.strategy) == ([{"CPU": 1}] * 3, [0, 1, 2], "SPREAD")


def test_slots_are_counted_by_the_scarcest_resource():
    assert num_slots({"CPU": 8, "GPU": 2}, {"CPU": 2, "GPU": 1}) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": 2, "placement": "pack"}, "placement='pack': must be one of 'PACK'"),
        ({"num_workers": 2, "num_nodes": 2, "placement": "SPREAD"}, "leave one out"),
        ({"num_nodes": 2}, "num_nodes=2 without workers"),
        ({"placement": "SPREAD"}, "placement='SPREAD' without workers"),
        ({"num_workers": 2, "num_nodes": 0}, "num_nodes=0"),
        ({"num_workers": 2, "resources_per_worker": {"CPU": -1}}, "amounts of 0 or more"),
        ({"num_workers": 2, "resources_per_worker": {"num_cpus": 1}}, "did you mean 'CPU'"),
        ({"num_workers": 2, "resources_per_worker": {"CPU": 0}}, "asks for nothing"),
        ({"num_workers": 2, "resources_per_worker": {"GPU": 1.5}}, "whole number"),
        ({"num_workers": 2, "accelerator": "cpu", "resources_per_worker": {"GPU": 1}}, "say accelerator='gpu'"),
        ({"num_workers": 2, "resources_per_worker": {"object_store_memory": 1}}, "leave it out"),
        ({"num_workers": 2, "label_selector": {"zone": "in()"}}, "no label of Ray's"),
        ({"num_workers": 2, "label_selector": {"zone": 1}}, "must be strings"),
    ],
)
def test_invalid_arguments_are_errors(arguments, message):
    with pytest.raises(pl.ConfigError, match=message):
        pl.Trainer(**arguments)


@pytest.mark.parametrize("condition", ["a", "!a", "in(a, b)", "!in(a,b)", "a b", "in(a", "!!a", "-a", "a" * 64])
def test_labels_that_ray_rejects_are_errors(condition):
    from ray._private.label_utils import validate_label_selector

    arguments = {"num_workers": 1, "label_selector": {"my.org/zone": condition}}
    if validate_label_selector(arguments["label_selector"]) is None:
        assert pl.Trainer(**arguments).num_workers == 1
    else:
        with pytest.raises(pl.ConfigError):
            pl.Trainer(**arguments)


def test_num_nodes_multiplies_the_workers(monkeypatch):
    monkeypatch.setattr("raylit.trainer.arguments.workers.is_on_cluster", lambda: True)
    processes = pl.Trainer(num_processes=8, num_nodes=2)._plan.workers
    assert (processes.num_workers, processes.num_nodes, processes.accelerator.name) == (16, 2, "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    gpus = pl.Trainer(gpus=2, num_nodes=2)._plan.workers
    assert (gpus.num_workers, gpus.num_nodes, gpus.accelerator.name) == (4, 2, "cuda")


def test_an_autoscaler_of_version_1_is_distinguished_from_its_placeholder():
    report = {"active_nodes": {"ray.head.default": 1}, "pending_launches": {"gpu": 2}}
    assert ray_core.parse_old_autoscaling({"autoscaler_report": report}).starting == {"gpu": 2}
    mirror = {"active_nodes": {"node_3fa1": 1}, "pending_launches": {}}
    assert ray_core.parse_old_autoscaling({"autoscaler_report": mirror}) is None
    assert ray_core.parse_old_autoscaling({"load_metrics_report": {}}) is None


def unfinished_groups():
    return [
        entry for entry in ray.util.placement_group_table().values() if entry["state"] not in ("REMOVED", "CREATED")
    ]


@pytest.fixture
def busy_node():
    """Occupy a CPU of the session's node; yield resources that nothing can have now, and a function that frees them."""
    local_cluster.connect()
    group = ray.util.placement_group([{"CPU": 1}])
    assert group.wait(20)
    unavailable = Workers(
        num_workers=1, resources_per_worker={"CPU": ray.cluster_resources()["CPU"] - 0.5}, start_timeout_s=30
    )
    yield unavailable, lambda: ray.util.remove_placement_group(group)
    ray.util.remove_placement_group(group)


def test_a_request_for_resources_in_use_waits_and_prints_a_line(busy_node, capsys):
    unavailable, give_back = busy_node
    assert ray_core.read_autoscaling() is None
    threading.Timer(3.0, give_back).start()
    placement = Placement(unavailable)
    placement.remove()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("raylit: waiting since ")
    assert f"for 1 worker of {unavailable.resources_per_worker['CPU']:g} CPU each; free now: " in lines[0]
    assert lines[0].endswith("others hold the rest")


def test_a_timeout_withdraws_the_resource_request(busy_node):
    from dataclasses import replace

    started = time.monotonic()
    with pytest.raises(pl.ResourcesError, match=r"1 worker of .* CPU each; free now: .*start_timeout_s=1\b"):
        Placement(replace(busy_node[0], start_timeout_s=1))
    assert time.monotonic() - started < 60
    assert unfinished_groups() == []


def test_ctrl_c_withdraws_the_resource_request(busy_node):
    threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT]).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Placement(busy_node[0])
    assert time.monotonic() - started < 60
    assert unfinished_groups() == []


def fit_in_a_task(num_workers, **resources):
    """Return a function for Ray to run that does not refer to this module, which the workers cannot import."""
    path = str(TESTS)

    def fit():
        import sys

        sys.path.insert(0, path)
        from models import Regression, RegressionData

        import raylit as pl
        from raylit.driver.ray import local_cluster

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            num_workers=num_workers,
            max_epochs=1,
            resources_per_worker=resources,
            start_timeout_s=30,
            keep_workers_s=0,
            **quiet,
        )
        trainer.fit(Regression(), RegressionData())
        return local_cluster.is_embedded(), trainer.global_step

    return fit


def test_a_trainer_in_a_task_of_the_embedded_node_gets_resources():
    local_cluster.connect()
    task = ray.remote(num_cpus=1)(fit_in_a_task(2))
    assert ray.get(task.remote(), timeout=90) == (True, 3)


def test_a_trainer_uses_the_placement_group_of_its_task():
    local_cluster.connect()
    group = ray.util.placement_group([{"CPU": 0.1}] * 3)
    assert group.wait(20)
    before = len(ray.util.placement_group_table())
    here = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=0)

    def places(num_workers, **workers):
        def place():
            from raylit.config import Workers
            from raylit.driver.ray.placement import Placement

            placement = Placement(Workers(num_workers=num_workers, start_timeout_s=20, **workers))
            placement.remove()
            strategies = [placement.options(index)["scheduling_strategy"] for index in range(num_workers)]
            return [strategy.placement_group_bundle_index for strategy in strategies]

        return ray.remote(num_cpus=0.1)(place).options(scheduling_strategy=here).remote()

    try:
        assert ray.get(places(2, resources_per_worker={"CPU": 0.1}), timeout=60) == [1, 2]
        assert ray.get(places(3, resources_per_worker={"CPU": 0.05}), timeout=60) == [1, 1, 2]
        # The task's own 0.1 as well, as it only waits.
        assert ray.get(places(3, resources_per_worker={"CPU": 0.1}), timeout=60) == [1, 2, 0]
        with pytest.raises(pl.ResourcesError, match=r"PlacementGroupFactory\(\[\{\"CPU\": 0.1\}\] \+ .* \* 4\)"):
            ray.get(places(4, resources_per_worker={"CPU": 0.1}), timeout=60)
        with pytest.raises(pl.ResourcesError, match="that is too small"):
            ray.get(places(2, num_nodes=2, resources_per_worker={"CPU": 0.1}), timeout=60)
        assert ray.util.placement_group_table(group)["state"] == "CREATED"
        assert len(ray.util.placement_group_table()) == before
    finally:
        ray.util.remove_placement_group(group)
