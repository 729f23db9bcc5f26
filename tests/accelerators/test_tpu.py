"""TPUs without a TPU: what the arguments ask for, the slices that fit, and the variables of a worker's process."""

import importlib.util
from types import MappingProxyType

import pytest
import torch
from tpu_hosts import make_inventory, pretend_slices

import raylit as pl
from raylit.accelerators import CPUAccelerator, registry
from raylit.accelerators.torch_tpu import TorchTPUAccelerator
from raylit.accelerators.tpu_slices import (
    TPUHost,
    TPUInventory,
    TPUPlace,
    TPUSlices,
    choose_topology,
    has_topology,
    parse_topology,
    parse_version,
)
from raylit.trainer.arguments.tpu import TPURequest, lay_out_workers


class WorkerPerHost(CPUAccelerator):
    """As torch_xla: a worker drives all chips of its host."""

    name = "per_host"
    is_on_tpu = is_spmd = True


class WorkerPerChip(CPUAccelerator):
    """As TorchTPU."""

    name = "per_chip"
    is_on_tpu = True
    resources = MappingProxyType({"TPU": 1.0})


POD = ("a", "v6e", "4x4", 4, 4)
TWO_PODS = (POD, ("b", "v6e", "4x4", 4, 4))
CUBE = ("c", "v4", "2x2x2", 2, 4)
HOST = ("", "v6e", "2x2", 1, 4)


@pytest.mark.parametrize(
    ("accelerator", "slices", "request_", "expected"),
    [
        (WorkerPerHost(), [POD], {}, (4, 4, "4x4", 1)),
        (WorkerPerChip(), [POD], {}, (16, 1, "4x4", 1)),
        (WorkerPerHost(), [POD], {"num_workers": 4}, (4, 4, "4x4", 1)),
        (WorkerPerHost(), [POD], {"num_cores": 16}, (4, 4, "4x4", 1)),
        (WorkerPerHost(), [POD], {"num_hosts": 4}, (4, 4, "4x4", 1)),
        (WorkerPerHost(), TWO_PODS, {"num_workers": 8}, (8, 4, "4x4", 2)),
        (WorkerPerChip(), TWO_PODS, {"num_workers": 32}, (32, 1, "4x4", 2)),
        (WorkerPerHost(), [CUBE], {"num_cores": 16}, (2, 4, "2x2x2", 1)),  # two cores a chip
        (WorkerPerChip(), [CUBE], {"num_cores": 16}, (8, 1, "2x2x2", 1)),
        (WorkerPerHost(), [POD, HOST], {"num_workers": 1}, (1, 4, "2x2", 1)),
        (WorkerPerHost(), [POD, HOST], {"topology": "4x4"}, (4, 4, "4x4", 1)),
        (WorkerPerHost(), [CUBE, POD], {"accelerator_version": "v6e"}, (4, 4, "4x4", 1)),
        (WorkerPerHost(), [HOST, HOST], {"num_workers": 2}, (2, 4, "2x2", 2)),
        (WorkerPerHost(), [("a", "v6e", "2x4", 2, 4)], {"num_cores": 8}, (2, 4, "2x4", 1)),
        (WorkerPerHost(), [("", "v6e", "2x4", 1, 8)], {"num_cores": 8}, (1, 8, "2x4", 1)),
        (WorkerPerChip(), [("a", "v7x", "2x2x2", 2, 8)], {"devices_per_chip": 2}, (16, 1, "2x2x2", 1)),
    ],
)
def test_a_request_becomes_whole_slices_and_workers(accelerator, slices, request_, expected):
    layout = lay_out_workers(TPURequest(accelerator=accelerator, **request_), make_inventory(*slices))
    assert layout.slices is not None
    assert (
        layout.num_workers,
        layout.devices_per_worker,
        layout.slices.topology,
        layout.slices.num_slices,
    ) == expected


@pytest.mark.parametrize(
    ("accelerator", "request_", "expected"),
    [
        (WorkerPerHost(), {}, (1, 4)),
        (WorkerPerHost(), {"num_cores": 8}, (1, 4)),  # the hosts of versions 2 and 3
        (WorkerPerHost(), {"num_cores": 1}, (1, 1)),
        (WorkerPerChip(), {"num_cores": 1}, (1, 1)),
        (WorkerPerChip(), {"num_workers": 1}, (1, 1)),
    ],
)
def test_a_host_that_tells_no_slice_has_one_worker(accelerator, request_, expected):
    inventory = TPUInventory(hosts=(TPUHost(num_devices=4),), where="this cluster")
    layout = lay_out_workers(TPURequest(accelerator=accelerator, **request_), inventory)
    assert (layout.num_workers, layout.devices_per_worker, layout.slices) == (*expected, None)


@pytest.mark.parametrize(
    ("slices", "request_", "message"),
    [
        ([], {}, "there is no TPU in this cluster.*RAY_ADDRESS"),
        ([POD], {"num_workers": 3}, "num_workers=3: a slice is used as a whole.*1 slice v6e 4x4 .4 hosts with 4 chips"),
        ([POD], {"num_workers": 8}, "Ask for num_workers=4 .one for each host. or tpu_cores=16"),
        (TWO_PODS, {"num_workers": 12}, "times the number of slices, up to 2"),
        ([POD], {"num_cores": 32}, "tpu_cores=32: a slice is used as a whole"),
        ([POD], {"num_workers": 4, "num_cores": 32}, "a slice is used as a whole"),
        ([POD], {"topology": "8x8"}, "no such complete TPU slice, but 4 host.s. with 4 TPU of v6e slice 4x4"),
        ([POD], {"accelerator_version": "v4"}, "no such complete TPU slice"),
        ([("a", "v6e", "4x4", 3, 4)], {}, "no such complete TPU slice, but 3 host.*Ray must run on all hosts"),
        ([POD, CUBE], {}, "several kinds of slices.*say topology= or accelerator_version="),
    ],
)
def test_what_no_slice_offers_is_refused_with_what_there_is(slices, request_, message):
    with pytest.raises(pl.ConfigError, match=message):
        lay_out_workers(TPURequest(accelerator=WorkerPerHost(), **request_), make_inventory(*slices))


def test_an_autoscaler_is_told_what_to_add():
    inventory = make_inventory(can_grow=True)
    request = TPURequest(accelerator=WorkerPerHost(), topology="4x4", accelerator_version="v6e", num_workers=8)
    layout = lay_out_workers(request, inventory)
    assert layout.slices is not None
    assert (layout.num_workers, layout.slices.num_slices, layout.devices_per_worker) == (8, 2, 4)
    by_cores = TPURequest(accelerator=WorkerPerHost(), accelerator_version="v5p", num_cores=16)
    assert lay_out_workers(by_cores, inventory).num_workers == 2
    with pytest.raises(pl.ConfigError, match="its autoscaler must know which to add: say topology="):
        lay_out_workers(TPURequest(accelerator=WorkerPerHost(), num_workers=8), inventory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tpu_cores": 3}, r"tpu_cores=3: no TPU slice has 3 cores. There are slices of 1, 2, 4, 8, 16,"),
        ({"tpu_cores": 3, "num_nodes": 3}, "tpu_cores=3 and num_nodes=3: no TPU slice has 9 cores"),
        ({"tpu_cores": 8, "gpus": 1}, "tpu_cores=8 and gpus=1 contradict each other"),
        ({"tpu_cores": 8, "accelerator": "cpu"}, "tpu_cores=8 and accelerator='cpu' contradict each other"),
        ({"accelerator": WorkerPerHost(), "num_workers": 4, "topology": "3x3"}, "topology='3x3': no slice of a TPU"),
        (
            {"accelerator": WorkerPerHost(), "num_workers": 4, "topology": "4x4", "accelerator_version": "v4"},
            "topology='4x4': no v4 slice has it. There is v4: 2x2x1, 2x2x2",
        ),
        ({"accelerator": WorkerPerHost(), "accelerator_version": "v1"}, "accelerator_version='v1': must be one of v2"),
        ({"topology": "4x4", "num_workers": 2}, "topology='4x4' and accelerator='cpu': only TPUs have it"),
        ({"accelerator": "tpu"}, "neither torch_tpu nor torch_xla is installed.*raylit.tpu.*raylit.xla"),
        ({"accelerator": "torch_tpu", "num_workers": 4}, "torch_tpu, which is not installed.*raylit.tpu"),
        ({"accelerator": TorchTPUAccelerator(), "num_workers": 4}, "this machine has no TPU chips.*RAY_ADDRESS"),
    ],
)
def test_arguments_that_name_no_tpu_are_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(registry, "is_package_installed", lambda name: False)
    monkeypatch.setattr("raylit.trainer.arguments.workers.is_on_cluster", lambda: False)
    with pytest.raises(pl.ConfigError, match=message):
        pl.Trainer(**arguments)


def test_the_number_of_devices_of_a_chip_is_checked(monkeypatch):
    monkeypatch.setenv("RAY_TPU_RESOURCE_PER_CHIP", "two")
    with pytest.raises(pl.ConfigError, match="RAY_TPU_RESOURCE_PER_CHIP='two': must be a positive integer"):
        pl.Trainer(accelerator=WorkerPerHost(), num_workers=4)


def test_the_word_tpu_takes_what_is_installed(monkeypatch):
    built = []
    for name in ("torch_tpu", "xla"):
        monkeypatch.setattr(registry, f"_build_{name}", lambda name=name: built.append(name) or WorkerPerHost())
    for installed in (("torch_tpu", "torch_xla"), ("torch_xla",)):
        monkeypatch.setattr(registry, "is_package_installed", installed.__contains__)
        pl.Trainer(accelerator="tpu", num_workers=0)
    assert built == ["torch_tpu", "xla"]


def test_auto_takes_a_tpu_of_this_machine_only(monkeypatch):
    monkeypatch.setattr(registry, "is_package_installed", lambda name: True)
    monkeypatch.setattr(registry, "_build_torch_tpu", WorkerPerChip)
    assert registry.choose_accelerator().name != "per_chip"
    monkeypatch.setattr(registry, "has_tpu_chips", lambda: True)
    monkeypatch.setattr(WorkerPerChip, "is_automatic", True)
    assert registry.choose_accelerator().name == "per_chip"


def test_the_pages_tpu_example_is_planned(monkeypatch):
    """`precision=16` is bfloat16 on a TPU."""
    pretend_slices(monkeypatch, ("", "v6e", "2x4", 1, 8))
    trainer = pl.Trainer(
        tpu_cores=8, precision=16, early_stop_checkpoint=True, limit_train_batches=0.5, val_check_interval=0.25
    )
    plan = trainer.plan
    assert (plan.workers.num_workers, plan.workers.num_nodes, trainer.num_nodes) == (8, None, 1)
    assert (plan.workers.resources_per_worker, plan.optimization.precision) == ({"TPU": 1.0}, "bf16-mixed")
    with pytest.raises(pl.ConfigError, match="precision='16-mixed' with accelerator='torch_tpu'"):
        pl.Trainer(tpu_cores=8, precision="16-mixed")
    with pytest.raises(pl.ConfigError, match=r"'TPU': 4.*has 1 TPU here; leave TPU out"):
        pl.Trainer(tpu_cores=8, resources_per_worker={"TPU": 4})
    with pytest.raises(pl.ConfigError, match="placement='SPREAD': the workers on TPU slices have their places"):
        pl.Trainer(tpu_cores=8, placement="SPREAD")


@pytest.mark.parametrize(
    ("given", "version"),
    [("v6e", "v6e"), ("TPU-V6E", "v6e"), ("v5e", "v5litepod"), ("tpu7x", "v7x"), ("V5P", "v5p")],
)
def test_versions_are_known_by_several_names(given, version):
    assert parse_version(given) == version


def test_topologies_are_those_that_ray_reserves():
    tpu = pytest.importorskip("ray._private.accelerators.tpu")
    for version, topologies in tpu.VALID_TPU_TOPOLOGY.items():
        assert all(has_topology(version, topology) for topology in topologies)
        for topology in topologies:
            slices = TPUSlices(
                accelerator_version=version,
                topology=parse_topology(topology, accelerator_version=version),
                chips_per_host=tpu.get_chips_per_host(topology, version),
            )
            assert slices.pod_type == tpu.infer_tpu_pod_type_from_topology(topology, version)
    assert (choose_topology("v6e", 16), choose_topology("v4", 128), choose_topology("v6e", 6)) == (
        "4x4",
        "4x4x8",
        None,
    )


def make_place(rank, *, slices, workers_per_host, ips):
    return TPUPlace(
        slices=slices,
        rank=rank,
        local_rank=rank % workers_per_host,
        world_size=len(ips) * workers_per_host,
        local_world_size=workers_per_host,
        host_ips=tuple(ip for ip in ips for _ in range(workers_per_host)),
    )


def test_torch_tpu_finds_its_place_in_the_environment():
    slices = TPUSlices(accelerator_version="v6e", topology="2x4", chips_per_host=4)
    place = make_place(5, slices=slices, workers_per_host=4, ips=["10.0.0.1", "10.0.0.2"])
    variables = TorchTPUAccelerator(compilation_cache="gs://bucket/cache").process_variables(place)
    assert variables == {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        "TORCH_TPU_TIER2_COMPILATION_CACHE": "raylit",
        "TORCH_TPU_TIER3_COMPILATION_CACHE_ROOT": "gs://bucket/cache",
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
        "TORCH_TPU_SLICEBUILDER_ADDRESSES": ",".join(
            f"10.0.0.{host}:{port}" for host in (1, 2) for port in (8471, 8472, 8473, 8474)
        ),
        "TORCH_TPU_TOPOLOGY": "2,4,1",
        "TORCH_TPU_DEVICES_PER_HOST": "4",
    }


def test_addresses_are_those_of_the_ranks_own_slice():
    slices = TPUSlices(accelerator_version="v6e", topology="2x2", chips_per_host=4, num_slices=2)
    place = make_place(6, slices=slices, workers_per_host=4, ips=["10.0.0.1", "10.0.0.2"])
    addresses = TorchTPUAccelerator().process_variables(place)["TORCH_TPU_SLICEBUILDER_ADDRESSES"]
    assert addresses == ",".join(f"10.0.0.2:{port}" for port in (8471, 8472, 8473, 8474))
    assert place.slice_id == 1


def test_a_chip_with_two_devices_has_a_fourth_dimension():
    slices = TPUSlices(accelerator_version="v7x", topology="2x2x1", chips_per_host=4, devices_per_chip=2)
    place = make_place(0, slices=slices, workers_per_host=8, ips=["10.0.0.1"])
    assert TorchTPUAccelerator().process_variables(place)["TORCH_TPU_TOPOLOGY"] == "2,2,1,2"
    assert slices.num_devices == 8


def test_compiled_programs_are_kept_in_the_runs_storage(tmp_path, monkeypatch):
    accelerator = TorchTPUAccelerator()
    assert accelerator.with_storage(str(tmp_path)).compilation_cache == str(tmp_path / "torch_tpu_cache")
    assert accelerator.with_storage("gs://bucket/runs").compilation_cache == "gs://bucket/runs/torch_tpu_cache"
    assert accelerator.with_storage("s3://bucket/runs") == accelerator  # torch_tpu does not write there
    given = TorchTPUAccelerator(compilation_cache="gs://mine")
    assert given.with_storage(str(tmp_path)) == given
    monkeypatch.setenv("TORCH_TPU_TIER3_COMPILATION_CACHE_ROOT", "gs://theirs")
    assert given.process_variables(None)["TORCH_TPU_TIER3_COMPILATION_CACHE_ROOT"] == "gs://theirs"


def test_torch_tpus_errors_are_told_apart():
    accelerator = TorchTPUAccelerator()
    full = RuntimeError("to_copy(): the TPU ran out of memory while awaiting the materialization of value float32[8]")
    assert accelerator.is_out_of_memory(full)
    assert accelerator.is_out_of_memory(torch.OutOfMemoryError("out"))
    assert not accelerator.is_out_of_memory(RuntimeError("shapes differ"))
    assert accelerator.is_device_failure(RuntimeError("PJRT client failed"))
    assert not accelerator.is_device_failure(ValueError("TPU"))


@pytest.mark.skipif(importlib.util.find_spec("torch_tpu") is not None, reason="torch_tpu is installed")
def test_torch_tpu_is_quiet_where_it_is_missing():
    accelerator = TorchTPUAccelerator()
    assert not accelerator.is_available()
    assert (accelerator.num_devices(), accelerator.random_state(), accelerator.allocated_bytes()) == (0, None, 0)
    accelerator.empty_cache()
