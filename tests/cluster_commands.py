"""Find the command lines in the files of cluster/, and have each parsed by the program that it calls."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

CHECKOUT = Path(__file__).parents[1]
CLUSTER = CHECKOUT / "cluster"
LAUNCHER = ["aws.yaml", "azure.yaml", "gcp-tpu.yaml", "gcp.yaml", "local.yaml"]
KUBERAY = ["raycluster.yaml", "raycronjob.yaml", "rayjob-tpu.yaml", "rayjob.yaml"]
SEPARATORS = {
    "&&",
    "||",
    ";",
    "|",
    "&",
    ";;",
    "do",
    "then",
    "else",
    "if",
    "!",
    "until",
    "while",
    "done",
    "fi",
    "(",
    ")",
}
VALUES = {
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "32",
    "SLURM_GPUS_ON_NODE": "4",
    "SLURM_JOB_ID": "123",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "4",
    "RAY_ADDRESS": "10.0.0.1:6379",
    "address": "10.0.0.1:6379",
    "RAY_HEAD_IP": "10.0.0.1",
    "RAYLIT_ROOT": "s3://your-bucket/raylit/digits",
    "root": "/shared/digits",
    "pid_file": "/tmp/pid",
}
"""What the variables of the scripts stand for, so that their commands can be parsed."""


def read_documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8")))


def read_ray_document(name: str) -> dict[str, Any]:
    """Return the document of a manifest that is KubeRay's."""
    [document] = [document for document in read_documents(name) if document["apiVersion"] == "ray.io/v1"]
    return document


def read_job_spec(name: str) -> dict[str, Any]:
    """Return the spec of a RayJob, or of the RayJobs that a RayCronJob makes."""
    spec = read_ray_document(name)["spec"]
    return spec.get("jobTemplate", spec)


def read_cluster_spec(name: str) -> dict[str, Any]:
    spec = read_job_spec(name)
    return spec.get("rayClusterSpec", spec)


def read_scripts() -> dict[str, str]:
    """Return every shell script below cluster/, by a name that says where it is; the README's code blocks too."""
    scripts = {"slurm.sbatch": (CLUSTER / "slurm.sbatch").read_text(encoding="utf-8")}
    for name in LAUNCHER:
        config = yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))
        for key, value in config.items():
            if key.endswith("_commands"):
                scripts.update({f"{name}:{key}[{number}]": line for number, line in enumerate(value)})
    scripts.update({f"{name}:entrypoint": read_job_spec(name)["entrypoint"] for name in KUBERAY[1:]})
    sky = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
    scripts.update({f"skypilot.yaml:{key}": sky[key] for key in ("setup", "run")})
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    scripts.update({f"README.md:{number}": block for number, block in enumerate(blocks)})
    return scripts


def find_commands(script: str, program: str) -> list[list[str]]:
    """Return the arguments of each call of `program` in a shell script, with VALUES in place of its variables."""
    return [words[words.index(program) + 1 :] for words in split_commands(script) if calls(words, program)]


def split_commands(script: str) -> Iterator[list[str]]:
    for line in expand(script).splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if word in SEPARATORS:
                yield words
                words = []
            else:
                words.append(word)
        yield words


def expand(script: str) -> str:
    script = re.sub(r"\\\n\s*", " ", script)
    script = re.sub(r"\$\(\((.*?)\)\)", "8", script)  # arithmetic
    script = re.sub(r"\$\(date [^)]*\)", "2026-01-01", script)
    script = re.sub(r"\$\{(\w+)(?::-[^}]*)?\}", r"$\1", script)
    return re.sub(r"\$(\w+)", lambda match: VALUES.get(match[1], match[0]), script)


def calls(words: list[str], program: str) -> bool:
    """Return whether a command calls the program, behind variables, `srun`, `exec` and `env` or not."""
    if program not in words:
        return False
    before = words[: words.index(program)]
    return all("=" in word for word in before) or before[0] in ("srun", "exec") or before[-1] == "--"


def parse_by_click(command: click.Command, arguments: list[str], name: str) -> click.Context:
    """Parse arguments as the program would, down to the subcommand, and run nothing.

    Raises:
        click.ClickException: If an option is unknown, has a wrong value or is missing.
    """
    if isinstance(command, click.Group):
        subcommand = command.commands.get(arguments[0])
        if subcommand is None:
            raise click.UsageError(f"{name} has no command {arguments[0]!r}")
        return parse_by_click(subcommand, arguments[1:], f"{name} {arguments[0]}")
    return command.make_context(name, list(arguments))
