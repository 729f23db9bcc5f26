"""The SkyPilot file, against its fields as written down here: SkyPilot is not a dependency of the tests.

The names and types are those of SkyPilot 0.14, whose own loader (`sky.Task.from_yaml`) has read the file once, by hand.
"""

import os
import re
import subprocess
from pathlib import Path
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


PROGRAMS = {
    # The first question finds no head yet.
    "ray": 'echo "ray $*" >> "$CALLS"; '
    'if [ "$1" = health-check ]; then [ -e "$HOME/asked" ] || { touch "$HOME/asked"; false; }; fi',
    "raylit": 'echo "raylit $* at $RAY_ADDRESS" >> "$CALLS"',
    "pgrep": "false",
    "sleep": "true",
}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_host_trains_and_the_others_join_it(rank: int, tmp_path: Path) -> None:
    """The commands of `run`, beside stand-ins for ray and raylit in the virtual environment that `setup` makes."""
    programs = tmp_path / "raylit-venv" / "bin"
    programs.mkdir(parents=True)
    for name, body in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "CALLS": str(calls),
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "4",
        "RAYLIT_ROOT": "s3://your-bucket/raylit/digits",
    }
    subprocess.run(["bash", "-c", read_task()["run"]], env=environment, cwd=tmp_path, timeout=60, check=True)
    lines = calls.read_text(encoding="utf-8").splitlines()
    ask = "ray health-check --address 10.0.0.1:6379"
    if rank == 0:
        assert lines[0] == ask
        assert lines[1].startswith("ray start --head --port=6379 --num-gpus=4 ")
        assert "--trainer.num_workers 8 " in lines[2]
        assert lines[2].endswith(" at 10.0.0.1:6379")
        assert len(lines) == 3
    else:
        assert lines == [ask, ask, "ray start --address=10.0.0.1:6379 --num-gpus=4 --disable-usage-stats"]
