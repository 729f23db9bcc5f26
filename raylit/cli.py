"""The `raylit` command, and RaylitCLI to build such a command for your own script, by jsonargparse. Driver."""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from raylit.callbacks.base import DriverCallback, Run
from raylit.checkpoint import files
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.errors import ConfigError, RaylitError
from raylit.seed import seed_everything
from raylit.storage import check_stays_below, join, write_text
from raylit.trainer.trainer import Trainer
from raylit.tune.sweep.parameters import parse_space, sample_space
from raylit.tune.sweep.sweep import sweep

_SUBCOMMANDS = {
    "fit": "Train; with --ckpt_path continue a run.",
    "validate": "The metrics of the validation loop.",
    "test": "The metrics of the test loop.",
    "predict": "Run the prediction loop.",
    "sweep": "Train with several configs from a search space and compare them.",
}

_DESCRIPTION = (
    "raylit: PyTorch Lightning's programming model on Ray actors. See raylit fit --help, raylit doctor --help."
)
_CONSOLIDATE = (
    "Make one file of a checkpoint that is a directory. Its tensors are in this process's memory for that time, all of "
    "them; without the optimizers' with --weights-only."
)
_DOCTOR = (
    "Examine the cluster that RAY_ADDRESS names, or this machine: hosts, versions, network, clocks, limits, start of "
    "workers, all-reduce, checkpoint directory. The exit code is 1 if something will go wrong in a training."
)
_SWEEP_OPTIONS = ("space", "metric", "mode", "num_samples", "max_concurrent", "max_failures", "name", "resume")
"""Arguments of `raylit.sweep` that are options of the subcommand; the workers are the Trainer's."""
_SPACE = (
    "The search space: an option's name, and a function of ray.tune with its arguments, as in "
    "{model.lr: {loguniform: [0.0001, 0.1]}, data.batch_size: {choice: [16, 32]}}."
)
_EXACT: dict[str, Any] = {"allow_abbrev": False}
"""No abbreviated options: an option of a later version could make them ambiguous."""


def main(args: list[str] | None = None) -> int:
    """Run a subcommand and return the exit status; raylit's errors are one line, those of user code a traceback."""
    args = sys.argv[1:] if args is None else args
    # A console script has its own directory on the path, not the current one with the user's modules. Workers get this
    # path, too.
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if args[:1] == ["checkpoint"]:
            convert_checkpoint(args[1:])
            return 0
        if args[:1] == ["doctor"]:
            return run_doctor(args[1:])
        RaylitCLI(args=args, parser_kwargs={"prog": "raylit", "version": metadata.version("raylit")})
    except RaylitError as error:
        print(f"raylit: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


class SavedConfig(DriverCallback):
    """Callback that writes `config.yaml` into the log directory when a fit starts."""

    def __init__(self, text: str, filename: str = "config.yaml") -> None:
        check_stays_below(filename, f"the config's file name {filename!r}")
        self._text = text
        self._filename = filename

    def on_start(self, run: Run) -> None:
        if run.state.stage == "fit" and not run.plan.is_dev_run:
            write_text(self._text, join(run.log_dir, self._filename))


class RaylitCLI:
    """Command line that builds a module, a data module and a Trainer from options and files, and runs a subcommand.

    Afterwards `model`, `datamodule`, `trainer`, `config` and `result` hold what was built, parsed and returned; after
    `sweep` only `config` and `result`, as its trials build the objects.

    Args:
        model_class: A class or function, whose arguments become options `--model.x`. None: the command line names the
            class (`--model my.module.LitModel`).
        datamodule_class: The same for the data module and `--data`.
        save_config_callback: Callback class that saves the parsed config when a fit starts. None: it is not saved.
        trainer_class: The Trainer or a subclass.
        trainer_defaults: Defaults of Trainer arguments, by name.
        seed_everything_default: Default of `--seed_everything`. True: the run gets a seed, which its config holds.
        parser_kwargs: Keywords of jsonargparse's ArgumentParser.
        subclass_mode_model: True: the command line names a subclass of `model_class`.
        subclass_mode_data: True: the command line names a subclass of `datamodule_class`.
        args: Arguments as a list of strings or as a dict. None: `sys.argv`.
        run: False builds the objects only, and there are no subcommands.

    Raises:
        ConfigError: If jsonargparse is not installed.
    """

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[DataModule] | Callable[..., DataModule] | None = None,
        save_config_callback: type[SavedConfig] | None = SavedConfig,
        trainer_class: type[Trainer] = Trainer,
        trainer_defaults: dict[str, Any] | None = None,
        seed_everything_default: bool | int = True,
        parser_kwargs: dict[str, Any] | None = None,
        subclass_mode_model: bool = False,
        subclass_mode_data: bool = False,
        args: Sequence[str] | dict[str, Any] | None = None,
        run: bool = True,
    ) -> None:
        self._model_class, self._datamodule_class = model_class, datamodule_class
        self._is_model_named = model_class is None or subclass_mode_model
        self._is_data_named = datamodule_class is None or subclass_mode_data
        self._trainer_class = trainer_class
        self._trainer_defaults = trainer_defaults or {}
        self._seed_default = seed_everything_default
        self._parser_kwargs = parser_kwargs or {}
        self._subparsers: dict[str, Any] = {}
        self.subcommand: str | None = None
        self.result: Any = None
        """Return value of the subcommand."""
        self.parser = (
            self._build_main_parser() if run else self._build_parser(has_checkpoint=False, **self._parser_kwargs)
        )
        parsed = self._parse_arguments(args)
        if run:
            self.subcommand = parsed.subcommand
            parsed = parsed[parsed.subcommand]
        self.config = parsed
        self.datamodule: DataModule | None = None
        self.model: LightningModule
        self.trainer: Trainer
        if self.subcommand == "sweep":
            self._sweep()  # its trials build the objects
            return
        self._build(None if self.subcommand != "fit" else save_config_callback)
        if run:
            self._run()

    # Helpers, in the order in which they are called

    def _build_main_parser(self) -> Any:
        parser = _parser_class()(**{"description": _DESCRIPTION, **_EXACT, **self._parser_kwargs})
        subcommands = parser.add_subcommands(required=True, dest="subcommand")
        for name, text in _SUBCOMMANDS.items():
            usage = f"{parser.prog} {name} [--config FILE] [--model ...] [--data ...] [--trainer.NAME VALUE] ..."
            subparser = self._subparsers[name] = self._build_parser(has_checkpoint=name != "sweep", usage=usage)
            if name == "sweep":
                _add_sweep_options(subparser)
            subcommands.add_subcommand(name, subparser, help=text)
        return parser

    def _build_parser(self, *, has_checkpoint: bool, **options: Any) -> Any:
        # An own usage line, as argparse prints all of the hundred options before each error.
        parser = _parser_class()(**{**_EXACT, **options})
        parser.add_argument("-c", "--config", action="config", help="A YAML file; later ones and options win.")
        parser.add_argument(
            "--seed_everything",
            type=bool | int | None,
            default=self._seed_default,
            help="True: a seed of its own for the run, which its config then has.",
        )
        model, data = self._model_class or LightningModule, self._datamodule_class or DataModule
        if self._is_model_named:
            parser.add_subclass_arguments(model, "model", required=True, fail_untyped=False)
        else:
            parser.add_class_arguments(model, "model", fail_untyped=False)
        if self._is_data_named:
            parser.add_subclass_arguments(data, "data", required=False, fail_untyped=False)
        else:
            parser.add_class_arguments(data, "data", fail_untyped=False)
        parser.add_class_arguments(self._trainer_class, "trainer", fail_untyped=False, instantiate=False)
        parser.set_defaults({f"trainer.{name}": value for name, value in self._trainer_defaults.items()})
        if has_checkpoint:
            parser.add_argument("--ckpt_path", type=str | None, default=None, help="A file or URL of a checkpoint.")
        return parser

    def _parse_arguments(self, args: Any) -> Any:
        if isinstance(args, dict):
            return self.parser.parse_object(args)
        return self.parser.parse_args(sys.argv[1:] if args is None else list(args))

    def _build(self, save_config: type[SavedConfig] | None) -> None:
        """Seed, then build module, data module and Trainer; the seed comes first as the weights depend on it."""
        _seed(self.config)
        parser = self.parser if self.subcommand is None else self._subparsers[self.subcommand]
        built = parser.instantiate(self.config)
        self.model, self.datamodule = built.model, built.get("data")
        arguments = dict(built.trainer)
        if save_config is not None:
            given = arguments.get("callbacks")
            callbacks = [] if given is None else [given] if not isinstance(given, (list, tuple)) else list(given)
            text = parser.dump(self.config)
            arguments["callbacks"] = [*callbacks, save_config(text)]
        self.trainer = self._trainer_class(**arguments)

    def _sweep(self) -> None:
        """Run trials, each of which parses the config with its own options added.

        Raises:
            ConfigError: If the search space is wrong, or the command has a Trainer class of its own.
        """
        if self._trainer_class is not Trainer:
            raise ConfigError(f"sweep: its trials use raylit.Trainer, not {self._trainer_class.__name__}")
        parser = self._subparsers["sweep"]
        config = self.config.clone()
        config.pop("config", None)
        options = {name: config.pop(name) for name in _SWEEP_OPTIONS}
        trainer = self._instantiate_trainer_arguments(parser, config.pop("trainer"))
        _seed(config)
        build = _TrialBuilder(
            cli_class=type(self),
            cli_arguments={
                "model_class": self._model_class,
                "datamodule_class": self._datamodule_class,
                "subclass_mode_model": self._is_model_named,
                "subclass_mode_data": self._is_data_named,
            },
            text=parser.dump(config, skip_validation=True),
        )
        space = parse_space(options.pop("space"))
        # An option that does not exist ends the command here, not each trial.
        self._subparsers["fit"].parse_args(build.build_arguments(sample_space(space)))
        self.result = sweep(build, space, **options, **trainer)
        if self.result.best_checkpoint is not None:
            print(f"best checkpoint: {self.result.best_checkpoint}")

    def _instantiate_trainer_arguments(self, parser: Any, trainer: Any) -> dict[str, Any]:
        """Return the arguments that differ from the Trainer's defaults, with their objects built."""
        defaults = parser.get_defaults().trainer
        given = [
            name for name, value in vars(trainer).items() if value != defaults[name] or name in self._trainer_defaults
        ]
        built = parser.instantiate(type(trainer)(trainer=trainer)).trainer
        return {name: built[name] for name in given}

    def _run(self) -> None:
        assert self.subcommand is not None
        if self.subcommand not in _SUBCOMMANDS:
            raise ConfigError(f"no subcommand {self.subcommand!r}: there are {', '.join(_SUBCOMMANDS)}")
        run = getattr(self.trainer, self.subcommand)
        self.result = run(self.model, datamodule=self.datamodule, ckpt_path=self.config.ckpt_path)


LightningCLI = RaylitCLI


def _seed(config: Any) -> None:
    """Seed this process as the config says, and note the seed in it."""
    seed = config.seed_everything
    if seed is not None and seed is not False:
        config.seed_everything = seed_everything(None if seed is True else seed)


def _add_sweep_options(parser: Any) -> None:
    """Add the arguments of `raylit.sweep`, with its own texts, and the space."""
    # jsonargparse finds names of the Trainer's arguments in the code of the sweep, too.
    others = {*inspect.signature(sweep).parameters, "enable_checkpointing", "checkpoint_callback"} - {*_SWEEP_OPTIONS}
    parser.add_function_arguments(sweep, as_group=False, skip={*others, "space"})
    parser.add_argument("--space", type=dict[str, Any], required=True, help=_SPACE)


@dataclass(frozen=True, kw_only=True, slots=True)
class _TrialBuilder:
    """Function that builds module, data and Trainer arguments of a trial: the config with the trial's options added."""

    cli_class: type[RaylitCLI]
    cli_arguments: dict[str, Any]
    text: str
    """The config of all trials as YAML, without the Trainer's."""

    def __call__(self, values: dict[str, Any]) -> tuple[Any, ...]:
        cli = self.cli_class(**self.cli_arguments, args=self.build_arguments(values), run=False)
        prefix = "trainer."
        arguments = {name.removeprefix(prefix): cli.config[name] for name in values if name.startswith(prefix)}
        data = [] if cli.datamodule is None else [cli.datamodule]
        return cli.model, *data, arguments

    def build_arguments(self, values: Mapping[str, Any]) -> list[str]:
        """Return the command line of a trial."""
        return ["--config", self.text, *(f"--{name}={_format_option(value)}" for name, value in values.items())]


def _format_option(value: Any) -> str:
    """Format a sampled value as on the command line; NumPy's numbers as Python's."""
    return value if isinstance(value, str) else json.dumps(value, default=lambda number: number.item())


def _parser_class() -> Any:
    try:
        # Optional, and not to be imported with raylit.
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise ConfigError("the command line needs jsonargparse: pip install 'raylit[cli]'") from error
    return ArgumentParser


def convert_checkpoint(args: Sequence[str]) -> None:
    """Run the command `raylit checkpoint`, which converts checkpoints, on its arguments.

    Raises:
        CheckpointError: If there is no checkpoint, it is damaged, or the file cannot be written.
    """
    parser = argparse.ArgumentParser(prog="raylit checkpoint", description="Work with checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="command")
    consolidate = commands.add_parser("consolidate", help="a directory into one file", description=_CONSOLIDATE)
    consolidate.add_argument("directory", help="a sharded checkpoint")
    consolidate.add_argument("file", help="the file to write, or a URL")
    consolidate.add_argument("--weights-only", action="store_true", help="leave out optimizers and the run's position")
    parsed = parser.parse_args(args)
    files.consolidate(parsed.directory, parsed.file, is_weights_only=parsed.weights_only)
    print(f"wrote {parsed.file}")


def run_doctor(args: Sequence[str]) -> int:
    """Run the command `raylit doctor`, which examines a cluster, and return 1 if it has found a problem, else 0."""
    parser = argparse.ArgumentParser(prog="raylit doctor", description=_DOCTOR, **_EXACT)
    parser.add_argument("--num-workers", type=int, metavar="N", help="workers to start (one per GPU, or per host)")
    parser.add_argument("--checkpoint-dir", metavar="URL", help="a directory or URL that every host should write to")
    parser.add_argument("--working-dir", metavar="DIR", help="a directory that is to be uploaded with a job")
    parser.add_argument("--start-timeout", type=float, default=60.0, metavar="S", help="seconds for workers to start")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parsed = parser.parse_args(args)
    if parsed.num_workers is not None and parsed.num_workers < 1:
        raise ConfigError(f"--num-workers {parsed.num_workers}: must be at least 1")
    if parsed.working_dir is not None and not os.path.isdir(parsed.working_dir):
        raise ConfigError(f"--working-dir {parsed.working_dir}: there is no such directory")
    # Importing Ray takes half a second, which other commands may not need.
    from raylit.driver.ray.doctor import examine_cluster, format_diagnosis

    diagnosis = examine_cluster(
        num_workers=parsed.num_workers,
        checkpoint_dir=parsed.checkpoint_dir,
        working_dir=parsed.working_dir,
        start_timeout_s=parsed.start_timeout,
    )
    print(diagnosis.to_json() if parsed.json else format_diagnosis(diagnosis))
    return 1 if diagnosis.problems else 0
