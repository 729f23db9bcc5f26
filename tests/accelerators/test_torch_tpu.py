"""TorchTPU against a stand-in for its package over CPU and gloo: the right calls, in the right order.

The stand-in is a package of its own in a temporary directory, which torch loads by the entry point that the real one
has. It refuses the functions of `torch.tpu` that the real one refuses. Nothing here has run on TPU hardware.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason="torch_tpu needs torch 2.11 or newer, and so does its stand-in",
    ),
]

LOADER = """
    import json, os, sys, types

    def note(name, **facts):
        with open(os.environ["STAND_IN_LOG"], "a") as log:
            log.write(json.dumps({"pid": os.getpid(), "call": name, **facts}) + "\\n")

    def refuse(*args, **kwargs):
        raise RuntimeError("an internal function of TorchTPU: use torch.accelerator")

    def load():
        # torch calls this at the end of its own import.
        import torch
        import torch.distributed as dist
        from torch.utils import backend_registration

        environment = {name: value for name, value in os.environ.items() if "TPU" in name or name in (
            "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        note("load", environment=environment)
        device = types.ModuleType("torch.tpu")
        state = {"is_initialized": False}
        generator = torch.Generator()

        class Generator:
            def get_state(self):
                note("get_state")
                return generator.get_state()

            def set_state(self, value):
                note("set_state")
                generator.set_state(value)

        def manual_seed(seed):
            note("manual_seed", seed=seed)
            generator.manual_seed(seed)
            state["is_initialized"] = True

        device.manual_seed = manual_seed
        device.manual_seed_all = lambda seed: None
        device._is_in_bad_fork = lambda: False
        device.is_initialized = lambda: state["is_initialized"]
        device.default_generators = [Generator()]
        device.get_amp_supported_dtype = lambda: [torch.bfloat16]
        for name in ("is_available", "device_count", "current_device", "set_device", "synchronize", "get_rng_state"):
            setattr(device, name, refuse)
        backend_registration._setup_privateuseone_for_python_backend("tpu", backend_module=device)
        sys.modules["torch.tpu"] = device

        answers = {
            "current_accelerator": torch.device("tpu"), "is_available": True, "device_count": 1,
            "current_device_index": 0, "synchronize": None, "memory_stats": {"allocated_bytes.all.current": 7},
            "max_memory_allocated": 9, "memory_allocated": 0, "reset_peak_memory_stats": None, "empty_cache": None,
        }
        quiet = ("current_accelerator", "is_available", "device_count", "current_device_index")

        def answer(name):
            def call(*args, **kwargs):
                if name not in quiet:
                    note(name)
                return answers[name]
            return call

        for name in answers:
            setattr(torch.accelerator, name, answer(name))

        def create_group(store, rank, size, timeout):
            note("backend", rank=rank, size=size)
            return dist.ProcessGroupGloo(store, rank, size, timeout)

        dist.Backend.register_backend("tpu_dist", create_group, devices=["tpu"])
"""

ON_CPU = """
    import torch
    from raylit.accelerators.torch_tpu import TorchTPUAccelerator
    from torch_tpu._loader import note

    class OnCPU(TorchTPUAccelerator):
        "TorchTPU, but the tensors are on the CPU, as nothing computes on the stand-in's device."

        def device(self):
            note("device", device=str(super().device()))
            return torch.device("cpu")
"""

SCRIPT = """
    import ray
    import torch
    import raylit as pl
    from models import Regression, RegressionData
    from on_cpu import OnCPU
    from ray.cluster_utils import Cluster
    from raylit.accelerators import get_accelerator
    from torch_tpu._loader import note

    # What needs no worker: the words, and autocast with the type of the device.
    assert [get_accelerator(name).name for name in ("tpu", "torch_tpu")] == ["torch_tpu", "torch_tpu"]
    assert get_accelerator("tpu").is_available()
    assert get_accelerator("tpu").device() == torch.device("tpu", 0)
    with torch.autocast(get_accelerator("tpu").device().type, dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("tpu")

    class Model(Regression):
        def on_train_start(self):
            super().on_train_start()
            note("train", state=self.trainer.accelerator.random_state() is not None)

    labels = {
        "ray.io/tpu-slice-name": "host", "ray.io/tpu-worker-id": "0",
        "ray.io/tpu-pod-type": "v6e-1", "ray.io/tpu-topology": "1x1",
    }
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "resources": {"TPU": 2}, "labels": labels, "include_dashboard": False},
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        trainer = pl.Trainer(
            accelerator=OnCPU(), max_epochs=1, profiler="simple",
            callbacks=[pl.DeviceStatsMonitor(cpu_stats=False), pl.ThroughputMonitor(lambda batch: len(batch[0]))],
            logger=pl.CSVLogger("."), log_every_n_steps=1,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir="runs",
        )
        workers = trainer._plan.workers
        assert (workers.num_workers, workers.resources_per_worker["TPU"]) == (2, 1.0)
        trainer.fit(Model(), RegressionData())
    finally:
        pl.shutdown()
        ray.shutdown()
        cluster.shutdown()
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """The calls that each worker has made of the stand-in, by rank."""
    directory = tmp_path_factory.mktemp("torch_tpu")
    package, metadata = directory / "torch_tpu", directory / "torch_tpu-0.2.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_loader.py").write_text(textwrap.dedent(LOADER))
    (directory / "on_cpu.py").write_text(textwrap.dedent(ON_CPU))
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_tpu\nVersion: 0.2.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_tpu = torch_tpu._loader:load\n")
    script = directory / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    log = directory / "calls.jsonl"
    paths = [str(directory), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "STAND_IN_LOG": str(log),
        "RAY_TPU_RESOURCE_PER_CHIP": "2",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    by_process = {}
    for line in log.read_text().splitlines():
        call = json.loads(line)
        by_process.setdefault(call["pid"], []).append(call)
    ranks = {calls[0]["environment"].get("RANK"): calls for calls in by_process.values()}
    assert {"0", "1"} <= ranks.keys()
    return {"0": ranks["0"], "1": ranks["1"], "directory": directory}


def first(calls, name):
    return next(index for index, call in enumerate(calls) if call["call"] == name)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_environment_is_complete_before_torch_is_imported(calls, rank):
    load = calls[rank][0]
    assert load["call"] == "load"
    environment = load["environment"]
    [host] = {address.rpartition(":")[0] for address in environment["TORCH_TPU_SLICEBUILDER_ADDRESSES"].split(",")}
    assert environment["TORCH_TPU_SLICEBUILDER_ADDRESSES"] == f"{host}:8471,{host}:8472"
    assert environment["TORCH_TPU_TOPOLOGY"] == "1,1,1,2"
    assert (environment["RANK"], environment["LOCAL_RANK"], environment["WORLD_SIZE"]) == (rank, rank, "2")
    assert environment["MASTER_ADDR"] == host
    assert environment["MASTER_PORT"].isdecimal()
    assert environment["TORCH_TPU_TIER2_COMPILATION_CACHE"] == "raylit"
    storage = environment["TORCH_TPU_TIER3_COMPILATION_CACHE_ROOT"]
    assert storage == str(calls["directory"] / "runs" / "torch_tpu_cache")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_group_is_formed_and_the_device_taken_before_the_training(calls, rank):
    mine = calls[rank]
    names = [call["call"] for call in mine]
    assert names.count("backend") == 1
    assert mine[first(mine, "backend")]["size"] == 2
    assert {call["device"] for call in mine if call["call"] == "device"} == {"tpu:0"}
    order = [first(mine, name) for name in ("load", "backend", "device", "train")]
    assert order == sorted(order)
    assert first(mine, "backend") < first(mine, "manual_seed") < first(mine, "train")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_random_state_memory_and_synchronization_are_the_devices(calls, rank):
    names = {call["call"] for call in calls[rank]}
    assert {
        "synchronize",
        "get_state",
        "set_state",
        "memory_stats",
        "max_memory_allocated",
        "reset_peak_memory_stats",
    } <= names
    assert {"empty_cache", "memory_allocated"} <= names  # between two runs
    assert calls[rank][first(calls[rank], "train")]["state"] is True
