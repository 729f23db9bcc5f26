"""The SkyPilot file, against its fields as written down here: SkyPilot is not a dependency of the tests.

The names and types are those of SkyPilot 0.14, whose own loader (`sky.Task.from_yaml`) has read the file once, by hand.
"""

import re
from typing import Any

import jsonschema
import pytest
from cluster_commands import read_documents

CLOUD = r"^(aws|gcp|azure|kubernetes|\*)(/[^/]+){0,2}$"
RESOURCES: dict[str, Any] = {
    "infra": {"type": "string", "pattern": CLOUD},
    "accelerators": {"type": "string", "pattern": r"^[\w-]+:\d+$"},
    "use_spot": {"type": "boolean"},
    "disk_size": {"type": "integer"},
    "job_recovery": {
        "type": "object",
        "properties": {
            "strategy": {"enum": ["EAGER_NEXT_REGION", "FAILOVER"]},
            "max_restarts_on_errors": {"type": "integer", "minimum": 0},
            "recover_on_exit_codes": {"type": "array", "items": {"type": "integer"}},
        },
        "additionalProperties": False,
    },
    "autostop": {
        "type": "object",
        "properties": {
            "idle_minutes": {"type": "integer", "minimum": 0},
            "down": {"type": "boolean"},
            "wait_for": {"enum": ["jobs_and_ssh", "jobs", "none"]},
        },
        "additionalProperties": False,
    },
}
TASK: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "num_nodes": {"type": "integer", "minimum": 1},
        "workdir": {"type": "string"},
        "setup": {"type": "string"},
        "run": {"type": "string"},
        "envs": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "secrets": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
        "resources": {
            "type": "object",
            "properties": {
                **RESOURCES,
                "any_of": {
                    "type": "array",
                    "items": {"type": "object", "properties": RESOURCES, "additionalProperties": False},
                },
            },
            "additionalProperties": False,
        },
    },
    "required": ["resources", "run"],
    "additionalProperties": False,
}


def read_task() -> dict[str, Any]:
    [task] = read_documents("skypilot.yaml")
    return task


def test_the_file_keeps_to_the_fields_of_skypilot() -> None:
    jsonschema.validate(read_task(), TASK)
    wrong = read_task()
    wrong["resources"]["autostop"]["idle_minute"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_minute"):
        jsonschema.validate(wrong, TASK)


def test_it_has_several_clouds_spot_hosts_recovery_and_an_end() -> None:
    task = read_task()
    resources = task["resources"]
    assert task["num_nodes"] > 1
    assert len(resources["any_of"]) > 1
    assert resources["use_spot"]
    assert resources["job_recovery"]["strategy"] == "EAGER_NEXT_REGION"
    assert resources["autostop"]["down"]


def test_the_ray_of_skypilot_is_left_alone() -> None:
    run = read_task()["run"]
    assert re.search(r"ray (stop|symmetric-run)", run) is None
    assert re.search(r"\b(6380|8266)\b", run) is None
    assert "address auto" not in run.replace("=", " ")
    assert "--port=6379" in run
    assert 'export RAY_ADDRESS="$head_ip:6379"' in run
