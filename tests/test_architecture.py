"""The rules of the house, checked by parsing the source: layers, where Ray may be imported, public names."""

import ast
import functools
import graphlib
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "raylit"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    {"accelerators", "compat", "config", "errors", "protocol", "storage", "text_table"},
    {"precision", "strategies"},
    {"callbacks", "checkpoint", "core", "loggers", "metrics", "profilers", "seed"},
    {"worker"},
    {"driver"},
    {"trainer", "tune"},
    {"api"},
    {"cli"},
    {"__init__"},
)
"""From the bottom up. A module imports from its own layer and those below it."""

RAY_IS_ALLOWED_IN = {"driver", "tune"}
"""Beside the files `compat/ray_*`, which only these may import."""

ATTRIBUTE_FUNCTIONS = ("getattr", "setattr", "hasattr", "delattr")

PUBLIC_UNDERSCORES = {"_asdict", "_fields", "_make", "_replace"}
"""Documented names of named tuples, which begin with an underscore only to keep clear of their fields."""


def part_of(file: pathlib.Path) -> str:
    """`driver` for raylit/driver/ray/actor.py, `api` for raylit/api.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(part: str) -> int:
    for number, parts in enumerate(LAYERS):
        if part in parts:
            return number
    raise AssertionError(f"raylit/{part} is in no layer: put it into LAYERS")


@functools.cache
def parse(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(file: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, wherever in the file it stands."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(file, node.lineno)}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_part(name: str) -> str | None:
    """`driver` for raylit.driver.ray.actor, `__init__` for a name of the package itself, None outside of raylit."""
    package, _, rest = name.partition(".")
    if package != "raylit":
        return None
    part = rest.partition(".")[0]
    is_part = part != "" and ((PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file())
    return part if is_part else "__init__"


def place(file: pathlib.Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def test_imports_point_down() -> None:
    upward = [
        f"{place(file, line)} imports {name}"
        for file in FILES
        for line, name in imports_of(file)
        if (part := imported_part(name)) is not None and layer_of(part) > layer_of(part_of(file))
    ]
    assert upward == []


def module_of(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_modules_import_each_other() -> None:
    """Imports inside functions count. TopologicalSorter raises CycleError, which names the modules."""
    modules = {module_of(file): file for file in FILES}
    graph = {
        module: {
            imported
            for _, name in imports_of(file)
            if (imported := name if name in modules else name.rpartition(".")[0]) in modules and imported != module
        }
        for module, file in modules.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules)


def test_layer_of_an_import_is_found() -> None:
    assert imported_part("raylit.driver.loop.coordinator.WorkerGroup") == "driver"
    assert imported_part("raylit.config.Plan") == "config"
    assert imported_part("raylit.Trainer") == "__init__"
    assert imported_part("raylit") == "__init__"
    assert imported_part("torch.nn") is None


def is_of_ray(name: str) -> bool:
    """Ray itself, or a file of compat/ that imports it."""
    return name.split(".")[0] == "ray" or name.startswith("raylit.compat.ray_")


def test_only_driver_tune_and_compat_import_ray() -> None:
    found = [
        f"{place(file, line)} imports {name}"
        for file in FILES
        if part_of(file) not in RAY_IS_ALLOWED_IN and not (part_of(file) == "compat" and file.name.startswith("ray_"))
        for line, name in imports_of(file)
        if is_of_ray(name)
    ]
    assert found == []
    assert is_of_ray("raylit.compat.ray_core.read_autoscaling")
    assert is_of_ray("ray.util")
    assert not is_of_ray("raylit.compat.private_names")


def private_names_of_others(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every private attribute of something other than `self`, `cls` and `super()`, read as an
    attribute or by getattr and the like, and of every import that has a private name in its path."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if has_private_part(alias.name))
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names if has_private_part(name))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ATTRIBUTE_FUNCTIONS:
            owner, name = node.args[0], node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value) and not is_own(owner):
                yield node.lineno, name.value


def is_private(name: str) -> bool:
    return re.match(r"_(?!_)\w", name) is not None and name not in PUBLIC_UNDERSCORES


def has_private_part(name: str) -> bool:
    return any(map(is_private, name.split(".")))


def is_own(owner: ast.expr) -> bool:
    return getattr(owner, "id", "") in ("self", "cls") or (
        isinstance(owner, ast.Call) and getattr(owner.func, "id", "") == "super"
    )


def test_private_names_are_confined_to_compat() -> None:
    found = [
        f"{place(file, line)} uses {name}"
        for file in FILES
        if part_of(file) != "compat"
        for line, name in private_names_of_others(parse(file))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("tensor._version", ["_version"]),
        ("torch._C._autograd", ["_C", "_autograd"]),
        ("getattr(module, '_buffers')", ["_buffers"]),
        ("import torch._dynamo", ["torch._dynamo"]),
        ("from torch._dynamo import utils", ["torch._dynamo.utils"]),
        ("from torch.nn.modules.batchnorm import _BatchNorm as Base", ["torch.nn.modules.batchnorm._BatchNorm"]),
        ("self._step(cls._kind, super()._build(), pair._replace(x=1), module.__dict__)", []),
        ("self._other._step", ["_step"]),
    ],
)
def test_own_private_names_are_allowed(source: str, names: list[str]) -> None:
    assert sorted(name for _, name in private_names_of_others(ast.parse(source))) == sorted(names)


PUBLIC_NAMES = [
    "Accelerator",
    "AdvancedProfiler",
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "CSVLogger",
    "Callback",
    "CheckpointError",
    "CombinedLoader",
    "ConfigError",
    "DDPStrategy",
    "DamagedCheckpoint",
    "DataModule",
    "DeviceStatsMonitor",
    "DriverCallback",
    "EMAWeightAveraging",
    "EarlyStopping",
    "EvalResult",
    "FSDPStrategy",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "LoggingError",
    "MLFlowLogger",
    "ModelCheckpoint",
    "ModelSummary",
    "ModuleError",
    "NotFiniteError",
    "OnExceptionCheckpoint",
    "PassThroughProfiler",
    "ProgressBar",
    "PyTorchProfiler",
    "RaylitError",
    "ResourcesError",
    "SimpleProfiler",
    "StochasticWeightAveraging",
    "SweepResult",
    "TQDMProgressBar",
    "TensorBoardLogger",
    "ThroughputMonitor",
    "Timer",
    "TrainResult",
    "Trainer",
    "TrainerView",
    "TuneReport",
    "Tuner",
    "UnknownArgumentError",
    "WandbLogger",
    "WeightAveraging",
    "WorkerDied",
    "WorkerFailed",
    "callbacks",
    "fit",
    "lr_find",
    "metrics",
    "predict",
    "register_accelerator",
    "register_strategy",
    "scale_batch_size",
    "seed_everything",
    "shutdown",
    "sweep",
    "test",
    "tune",
    "validate",
]
"""What `raylit` exports. A name that is added or removed is a change to the interface: say so in CHANGELOG.md."""


def test_public_names_are_those_of_the_list() -> None:
    import raylit

    assert sorted(PUBLIC_NAMES) == PUBLIC_NAMES
    assert raylit.__all__ == PUBLIC_NAMES
    assert [name for name in raylit.__all__ if not hasattr(raylit, name)] == []


FOLDERS_ONLY_IN_TESTS = {"benchmarks", "cluster_files", "examples", "gpu", "spec", "xla"}


def test_folders_of_tests_mirror_the_package() -> None:
    folders = [folder.relative_to(ROOT / "tests") for folder in (ROOT / "tests").rglob("*") if is_test_folder(folder)]
    mirrored = [folder for folder in folders if folder.parts[0] not in FOLDERS_ONLY_IN_TESTS]
    assert len(mirrored) > 10
    assert [str(folder) for folder in mirrored if not (PACKAGE / folder).is_dir()] == []
    assert [name for name in sorted(FOLDERS_ONLY_IN_TESTS) if not (ROOT / "tests" / name).is_dir()] == []


def is_test_folder(folder: pathlib.Path) -> bool:
    return folder.is_dir() and not folder.name.startswith((".", "__")) and any(folder.rglob("*.py"))


def test_importing_raylit_leaves_slow_packages_alone() -> None:
    code = "import sys, raylit; print([name for name in ('ray', 'tensorboard', 'yaml') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 -m venv .*$", readme, re.MULTILINE)
    assert [command.rsplit(" ", 1)[1] for command in commands] == ["examples/digits.py", "pytest"]
    assert commands[1] in [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
