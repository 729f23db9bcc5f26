"""The files for Ray's cluster launcher, by the schema that Ray ships and by Ray's own loader, without a cloud."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
from cluster_commands import LAUNCHER, read_documents

# Private to Ray: no public function reads a launcher file without calling the cloud.
from ray._private.accelerators.tpu import get_num_tpu_visible_chips_per_host, get_total_chips_from_accelerator_type
from ray.autoscaler._private.util import prepare_config, validate_config

SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
CLOUDS = [name for name in LAUNCHER if name != "local.yaml"]


def read_config(name: str) -> dict[str, Any]:
    [config] = read_documents(name)
    return config


@pytest.mark.parametrize("name", LAUNCHER)
def test_the_file_keeps_to_the_schema(name: str) -> None:
    config = read_config(name)
    if name == "local.yaml":
        config.pop("min_workers")  # Ray's loader takes it away for this provider, before it looks at the schema
    jsonschema.validate(config, SCHEMA)


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_loads_the_file(name: str) -> None:
    given = read_config(name)
    config = prepare_config(copy.deepcopy(given))
    validate_config(config)
    assert config["idle_timeout_minutes"] == given["idle_timeout_minutes"] == 10
    # Nothing of the launcher's defaults, which install Ray's nightly version, is left over.
    assert config["setup_commands"] == given["setup_commands"]
    assert not any("wheels" in line for key, value in config.items() if key.endswith("commands") for line in value)


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_misspelled_key_is_refused(name: str) -> None:
    config = read_config(name)
    config["idle_timeout_minute"] = config.pop("idle_timeout_minutes")
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_are_scaled_and_the_head_trains_nothing(name: str) -> None:
    config = read_config(name)
    head = config["available_node_types"].pop(config["head_node_type"])
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0}, 0)
    scaled = [worker for worker in config["available_node_types"].values() if worker["max_workers"] > 0]
    assert len(scaled) == 1
    [worker] = scaled
    assert worker["min_workers"] < worker["max_workers"] <= config["max_workers"]
    assert worker["resources"].keys() & {"GPU", "TPU"}
    node = worker["node_config"]
    is_spot = {
        "aws.yaml": lambda: node["InstanceMarketOptions"]["MarketType"] == "spot",
        "gcp.yaml": lambda: {"preemptible": True} in node["scheduling"],
        "azure.yaml": lambda: node["azure_arm_parameters"]["priority"] == "Spot",
        "gcp-tpu.yaml": lambda: node["schedulingConfig"]["preemptible"] is True,
    }
    assert is_spot[name]()


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "azure.yaml"])
def test_shared_memory_of_the_containers_is_sized(name: str) -> None:
    docker = read_config(name)["docker"]
    for options in (docker["head_run_options"], docker["worker_run_options"]):
        assert any(option.startswith("--shm-size=") for option in options)


@pytest.mark.parametrize("name", ["gcp.yaml", "gcp-tpu.yaml"])
def test_google_knows_the_kind_of_each_node(name: str) -> None:
    """Ray tells TPU hosts from others by these two keys; its own function for it needs Google's packages."""
    for key, node_type in read_config(name)["available_node_types"].items():
        is_tpu = name == "gcp-tpu.yaml" and key != "head"
        assert ("acceleratorType" in node_type["node_config"]) is is_tpu, key
        assert ("machineType" in node_type["node_config"]) is not is_tpu, key


def test_a_tpu_slice_of_the_launcher_is_a_single_host() -> None:
    """Ray's launcher cannot scale slices of several hosts."""
    worker = read_config("gcp-tpu.yaml")["available_node_types"]["v6e_8"]
    kind = worker["node_config"]["acceleratorType"]
    chips = get_total_chips_from_accelerator_type(kind)
    assert chips == get_num_tpu_visible_chips_per_host(kind) == worker["resources"]["TPU"]
    assert worker["resources"][f"TPU-{kind}-head"] == 1


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_asks_for_a_token_that_every_node_has(name: str) -> None:
    config = read_config(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        [start] = [line for line in config[key] if "ray start" in line]
        assert "RAY_AUTH_MODE=token" in start
        assert "PYTHONHASHSEED=0" in start
