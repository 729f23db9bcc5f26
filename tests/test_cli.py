"""The `raylit` command as a user types it, in processes of its own; the class in this one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import Regression, RegressionData

import raylit as pl

pytest.importorskip("jsonargparse")
from raylit.cli import LightningCLI, RaylitCLI, main
from raylit.trainer.arguments.command_line import read_argument_texts

MODEL, DATA = "project.module.Regression", "project.module.RegressionData"


@pytest.fixture
def raylit(tmp_path):
    """The command in a directory that has the user's package."""
    (tmp_path / "project").mkdir()
    shutil.copy(Path(__file__).with_name("models.py"), tmp_path / "project" / "module.py")

    def run(*args, returncode=0):
        command = Path(sys.executable).with_name("raylit")
        done = subprocess.run(
            [command, *map(str, args)], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == returncode, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_help_and_version(raylit):
    assert raylit("--version").strip() == "raylit 0.1.0"
    printed = raylit("--help")
    assert [name for name in ("fit", "validate", "test", "predict") if f"    {name} " not in printed] == []


def test_help_prints_the_text_of_each_argument_of_the_trainer(capsys, monkeypatch):
    pytest.importorskip("docstring_parser")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "1000")  # words with hyphens are not broken
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    texts = read_argument_texts(pl.Trainer)
    assert [name for name, text in texts.items() if text not in printed] == ["earlier"]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_fit_finds_modules_of_the_current_directory_on_the_workers_too(num_workers, raylit, tmp_path):
    raylit(
        *("fit", "--model", MODEL, "--model.lr", 0.1, "--data", DATA, "--data.batch_size", 4),
        *("--trainer.num_workers", num_workers, "--trainer.max_epochs", 1, "--seed_everything", 7),
    )
    run = tmp_path / "lightning_logs" / "version_0"
    [checkpoint] = (run / "checkpoints").glob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 12 // max(1, num_workers)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"] == {
        "class_path": MODEL,
        "init_args": {"width": 16, "dropout": 0.0, "lr": 0.1, "optimizer": "sgd"},
    }
    assert (config["trainer"]["num_workers"], config["seed_everything"]) == (num_workers, 7)


@pytest.mark.slow
def test_a_saved_config_trains_to_the_same_weights_and_evaluates(raylit, tmp_path):
    quiet = ("--trainer.enable_progress_bar", "false", "--trainer.num_workers", 0)
    raylit("fit", "--model", MODEL, "--data", DATA, "--trainer.max_epochs", 1, *quiet)
    first = tmp_path / "lightning_logs" / "version_0"
    raylit("fit", "--config", first / "config.yaml")
    [before], [after] = (
        list((tmp_path / "lightning_logs" / f"version_{number}" / "checkpoints").glob("*.ckpt")) for number in (0, 1)
    )
    weights, again = (torch.load(path, weights_only=True)["state_dict"] for path in (before, after))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    model = Regression()
    model.load_state_dict(weights)
    [expected] = pl.Trainer(logger=False, enable_progress_bar=False).validate(model, RegressionData(), verbose=False)
    given = ("--model", MODEL, "--data", DATA, "--ckpt_path", before, *quiet)
    [printed] = re.findall(r"val_loss\W+([\d.]+)", raylit("validate", *given))
    assert float(printed) == pytest.approx(expected["val_loss"], rel=1e-5)
    assert "test_loss" in raylit("test", *given)
    raylit("predict", *given)


def test_later_configs_and_options_win_and_print_config_only_prints(raylit, tmp_path):
    (tmp_path / "base.yaml").write_text(
        f"model:\n  class_path: {MODEL}\n  init_args:\n    lr: 0.5\ntrainer:\n  max_epochs: 5\n  limit_val_batches: 1\n"
    )
    (tmp_path / "more.yaml").write_text("trainer:\n  max_epochs: 7\n  limit_train_batches: 1.0\n")
    printed = raylit(
        *("fit", "--config", "base.yaml", "--config", "more.yaml", "--model.lr", 0.25, "--trainer.precision", "bf16"),
        "--print_config",
    )
    config = yaml.safe_load(printed)
    trainer = config["trainer"]
    assert (trainer["max_epochs"], trainer["precision"], config["model"]["init_args"]["lr"]) == (7, "bf16", 0.25)
    # A count stays a count and a fraction a fraction.
    assert (trainer["limit_val_batches"], trainer["limit_train_batches"]) == (1, 1.0)
    assert isinstance(trainer["limit_train_batches"], float)
    assert not (tmp_path / "lightning_logs").exists()


def test_what_is_wrong_is_told_in_a_few_lines(raylit):
    printed = raylit("fit", "--model", MODEL, "--model.lrr", 0.1, returncode=2)
    assert "'lrr' is not accepted" in printed
    assert len(printed.splitlines()) < 20
    printed = raylit("fit", "--model", MODEL, "--trainer.num_workers", -1, returncode=1)
    assert printed.splitlines()[-1] == (
        "raylit: ConfigError: num_workers=-1: must be 0 (this process) or the number of workers"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "--model", "models.Nope"], "has no attribute 'Nope'"),
        (["fit", "--model", "nowhere.Model"], "No module named 'nowhere'"),
        (["fit", "--model", "models.Regression", "--trainer.max_epoch", "3"], "max_epoch"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train"], "train"),
    ],
)
def test_what_is_unknown_is_named(args, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_jsonargparse_the_command_says_what_to_install(run_script):
    printed = run_script(
        """
        import sys
        sys.modules["jsonargparse"] = None
        from raylit.cli import main
        sys.stderr = sys.stdout
        print(main(["fit"]))
        """
    )
    assert printed.splitlines() == [
        "raylit: ConfigError: the command line needs jsonargparse: pip install 'raylit[cli]'",
        "1",
    ]


def test_doctor_prints_json_and_its_exit_code_says_whether_there_is_a_problem(tmp_path, capsys):
    code = main(["doctor", "--num-workers", "1", "--checkpoint-dir", str(tmp_path), "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert code == (0 if findings["is_healthy"] else 1)
    assert findings["is_healthy"] == (findings["problems"] == [])
    assert [host["checkpoint_dir"] for host in findings["hosts"]] == ["ok"]
    assert findings["workers"]["num_workers"] == 1


def test_doctor_names_an_address_where_nothing_answers(raylit, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    printed = raylit("doctor", returncode=1)
    assert "Problem 1 (connection): RAY_ADDRESS=127.0.0.1:1: no Ray head answers" in printed
    assert "ray start --head" in printed


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--num-workers", "0"), "--num-workers 0: must be at least 1"),
        (("--working-dir", "nowhere"), "--working-dir nowhere: there is no such directory"),
    ],
)
def test_doctor_refuses_what_it_cannot_use(args, words, capsys):
    assert main(["doctor", *args]) == 1
    assert capsys.readouterr().err == f"raylit: ConfigError: {words}\n"


def test_the_class_has_lightnings_arguments(tmp_path):
    cli = RaylitCLI(
        Regression,
        RegressionData,
        trainer_defaults={"max_epochs": 2, "logger": False, "enable_progress_bar": False, "num_workers": 0},
        seed_everything_default=3,
        args=["fit", "--model.lr", "0.2", "--data.batch_size", "16", "--trainer.max_epochs", "1"],
    )
    assert LightningCLI is RaylitCLI
    assert (cli.model.hparams.lr, cli.trainer.global_step, cli.datamodule.batch_size) == (0.2, 3, 16)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["lr"] == 0.2


def test_without_run_it_only_builds():
    cli = LightningCLI(Regression, args=["--model.lr", "0.2", "--trainer.callbacks+=raylit.Timer"], run=False)
    assert cli.trainer.global_step == 0
    assert cli.datamodule is None
    assert [callback for callback in cli.trainer.callbacks if isinstance(callback, pl.Timer)]


SWEEP = """
seed_everything: 7
model: {class_path: project.module.Regression, init_args: {width: 8}}
data: {class_path: project.module.RegressionData}
trainer: {max_epochs: 1, num_workers: 0}
space:
  model.lr: {grid_search: [0.01, 0.1]}
  data.batch_size: {choice: [4]}
  trainer.accumulate_grad_batches: {choice: [2]}
metric: val_loss
"""


@pytest.mark.slow
def test_a_sweep_of_a_config_trains_as_fit_does_with_the_trials_options(raylit, tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    printed = raylit("sweep", "--config", "sweep.yaml", "--name", "rates")
    assert len(re.findall(r"│\s+finished\s+│", printed)) == 2
    [best] = re.findall(r"best checkpoint: (\S+)", printed)
    checkpoint = torch.load(best, weights_only=True)
    assert checkpoint["global_step"] == 48 // 4 // 2
    learning_rate = checkpoint["hyper_parameters"]["lr"]
    raylit(
        *("fit", "--model", MODEL, "--model.width", 8, "--model.lr", learning_rate, "--data", DATA),
        *("--data.batch_size", 4, "--trainer.accumulate_grad_batches", 2, "--trainer.max_epochs", 1),
        *("--trainer.num_workers", 0, "--seed_everything", 7),
    )
    [again] = (tmp_path / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt")
    weights = torch.load(again, weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], value) for name, value in checkpoint["state_dict"].items())


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ("{model.lr: {loguni: [1, 2]}}", "is no function of ray.tune"),
        ("{model.lr: {uniform: [1]}}", "uniform with [1]"),
        ("{model.lr: 0.1}", "is no function of ray.tune"),
        ("{model.lr: {choice: []}}", "choice of an empty list"),
        ("{model.rate: {choice: [1]}}", "'rate' is not accepted"),
    ],
)
def test_a_wrong_space_is_an_error_before_a_trial_starts(space, told, tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("project.module", "models"))
    try:
        code = main(["sweep", "--config", "sweep.yaml", "--space", space])
    except SystemExit as error:  # of the parser
        code = error.code
    assert code > 0
    assert told in capsys.readouterr().err
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.slow
def test_a_sweep_keeps_the_trainer_defaults_of_its_script(run_script, tmp_path):
    run_script(
        f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from models import Regression, RegressionData
        from raylit.cli import RaylitCLI

        if __name__ == "__main__":
            cli = RaylitCLI(
                Regression,
                RegressionData,
                trainer_defaults={{"max_epochs": 3, "num_workers": 0}},
                args=["sweep", "--space", "{{model.lr: {{choice: [0.01]}}}}", "--metric=val_loss", "--name=three"],
            )
            assert cli.result.best_trial.config == {{"model.lr": 0.01}}
        """
    )
    checkpoints = (tmp_path / "sweeps" / "three").rglob("trial.ckpt")  # the best and the newest
    assert max(torch.load(path, weights_only=True)["epoch"] for path in checkpoints) == 2


def test_a_sweep_refuses_a_trainer_class_of_the_scripts_own():
    class OwnTrainer(pl.Trainer):
        pass

    given = ["sweep", "--space", "{model.lr: {choice: [0.01]}}", "--metric", "val_loss"]
    with pytest.raises(pl.ConfigError, match=r"its trials use raylit.Trainer, not OwnTrainer"):
        RaylitCLI(Regression, RegressionData, trainer_class=OwnTrainer, args=given)
