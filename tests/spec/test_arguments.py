"""The Trainer's arguments: names of both eras, what each value becomes, and what each refusal says."""

import inspect
import re
from argparse import ArgumentParser
from datetime import timedelta

import pytest
from models import Regression, RegressionData

import raylit as pl
from raylit.trainer.arguments.command_line import read_argument_texts
from raylit.trainer.arguments.names import EarlierNames


def plan_of(**arguments):
    return pl.Trainer(**arguments)._plan


def kinds_of(trainer):
    return [type(callback).__name__ for callback in trainer.callbacks]


def test_the_signature_shows_every_argument_with_its_default():
    parameters = inspect.signature(pl.Trainer).parameters
    defaults = {
        "max_steps": -1,
        "limit_val_batches": 1.0,
        "overfit_batches": 0.0,
        "num_sanity_val_steps": 2,
        "track_grad_norm": -1,
        "truncated_bptt_steps": None,
        "prepare_data_per_node": True,
        "sync_batchnorm": False,
        "terminate_on_nan": False,
        "logger": True,
        "enable_checkpointing": True,
        "early_stop_callback": False,
    }
    assert {name: parameters[name].default for name in defaults} == defaults
    assert all(name == "self" or p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for name, p in parameters.items())


def test_every_argument_has_a_text_which_the_help_of_argparse_prints():
    texts = read_argument_texts(pl.Trainer)
    names = [p.name for p in inspect.signature(pl.Trainer).parameters.values() if p.name != "earlier"]
    assert [name for name in texts if name != "earlier"] == names
    assert [name for name, text in texts.items() if not re.fullmatch(r"[A-Z\"0-9].*\.", text)] == []
    assert [name for name in EarlierNames.__annotations__ if name not in " ".join(texts.values())] == []
    printed = " ".join(pl.Trainer.add_argparse_args(ArgumentParser()).format_help().split())
    assert f"{texts['max_time']} (default: None)" in printed


def test_the_arguments_of_the_pages_era_are_accepted_with_their_defaults():
    trainer = pl.Trainer(
        logger=True,
        checkpoint_callback=True,
        early_stop_callback=False,
        callbacks=None,
        default_root_dir=None,
        gradient_clip_val=0,
        num_nodes=1,
        num_processes=1,
        gpus=None,
        tpu_cores=None,
        progress_bar_refresh_rate=1,
        overfit_batches=0.0,
        track_grad_norm=-1,
        check_val_every_n_epoch=1,
        fast_dev_run=False,
        accumulate_grad_batches=1,
        max_epochs=1000,
        min_epochs=1,
        max_steps=None,
        min_steps=None,
        limit_train_batches=1.0,
        limit_val_batches=1.0,
        limit_test_batches=1.0,
        val_check_interval=1.0,
        distributed_backend=None,
        sync_batchnorm=False,
        precision=32,
        weights_summary="top",
        num_sanity_val_steps=2,
        truncated_bptt_steps=None,
        resume_from_checkpoint=None,
        profiler=None,
        benchmark=False,
        deterministic=False,
        reload_dataloaders_every_epoch=False,
        auto_lr_find=False,
        replace_sampler_ddp=True,
        terminate_on_nan=False,
        auto_scale_batch_size=False,
        prepare_data_per_node=True,
    )
    assert kinds_of(trainer) == ["ProgressBar", "ModelSummary", "ModelCheckpoint"]
    assert trainer._plan.limits.max_epochs == 1000
    assert trainer._plan.workers.num_workers == 0


@pytest.mark.parametrize(
    ("earlier", "today"),
    [
        ({"reload_dataloaders_every_epoch": True}, {"reload_dataloaders_every_n_epochs": 1}),
        ({"replace_sampler_ddp": False}, {"use_distributed_sampler": False}),
        ({"distributed_backend": "ddp", "num_processes": 2}, {"strategy": "ddp", "num_workers": 2}),
        ({"distributed_backend": "ddp_cpu", "num_processes": 2}, {"strategy": "ddp", "num_workers": 2}),
        ({"weights_summary": None}, {"enable_model_summary": False}),
    ],
)
def test_an_earlier_name_means_what_todays_does(earlier, today):
    assert plan_of(**earlier) == plan_of(**today)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint_callback": False, "enable_checkpointing": True}, "checkpoint_callback=False and enable_check"),
        ({"progress_bar_refresh_rate": 0, "enable_progress_bar": True}, "progress_bar_refresh_rate=0"),
        ({"weights_summary": None, "enable_model_summary": True}, "weights_summary=None"),
        ({"distributed_backend": "ddp", "strategy": "single"}, "distributed_backend='ddp' and strategy='single'"),
        ({"replace_sampler_ddp": False, "use_distributed_sampler": True}, "replace_sampler_ddp=False"),
        ({"reload_dataloaders_every_epoch": True, "reload_dataloaders_every_n_epochs": 2}, "contradict"),
        ({"early_stop_checkpoint": True, "early_stop_callback": False}, "early_stop_checkpoint=True"),
    ],
)
def test_two_names_of_one_thing_with_different_values_are_an_error(arguments, message):
    with pytest.raises(pl.ConfigError, match=message):
        pl.Trainer(**arguments)


def test_two_names_of_one_thing_with_the_same_value_are_not():
    trainer = pl.Trainer(checkpoint_callback=False, enable_checkpointing=False, progress_bar_refresh_rate=5)
    assert kinds_of(trainer) == ["ProgressBar", "ModelSummary"]
    assert trainer.callbacks[0].refresh_rate == 5


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_epoch", "max_epochs"), ("checkpoint_callbak", "checkpoint_callback"), ("gpu", "gpus")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(pl.UnknownArgumentError, match=f"no argument '{name}': did you mean '{nearest}'"):
        pl.Trainer(**{name: 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tpu_cores": 3}, "tpu_cores=3: no TPU slice has 3 cores"),
        ({"distributed_backend": "dp"}, "distributed_backend='dp'"),
        ({"strategy": "horovod"}, "strategy='horovod'"),
        ({"limit_train_batches": 1.5}, r"limit_train_batches=1.5: must be a float in \[0, 1\]"),
        ({"limit_val_batches": -1}, "limit_val_batches=-1"),
        ({"overfit_batches": True}, "overfit_batches=True"),
        ({"max_epochs": -2}, "max_epochs=-2"),
        ({"max_steps": 1.5}, "max_steps=1.5"),
        ({"min_epochs": -1}, "min_epochs=-1"),
        ({"num_sanity_val_steps": -2}, "num_sanity_val_steps=-2"),
        ({"fast_dev_run": -1}, "fast_dev_run=-1"),
        ({"val_check_interval": 0}, "val_check_interval=0.*limit_val_batches=0 turns"),
        ({"val_check_interval": 1.5}, "val_check_interval=1.5"),
        ({"val_check_interval": "1 hour"}, "val_check_interval='1 hour': must be \"DD:HH:MM:SS\""),
        ({"val_check_interval": "00:00:00:00"}, "no time at all; 1 is after every batch"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0"),
        ({"check_val_every_n_epoch": None}, "val_check_interval=1.0 with check_val_every_n_epoch=None"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
        ({"accumulate_grad_batches": {-1: 2}}, "accumulate_grad_batches={-1: 2}"),
        ({"gradient_clip_val": -1}, "gradient_clip_val=-1"),
        ({"track_grad_norm": "max"}, "track_grad_norm='max'"),
        ({"truncated_bptt_steps": 0}, "truncated_bptt_steps=0"),
        ({"precision": 8}, "precision=8: must be one of 32, 64"),
        ({"max_time": "1 hour"}, "max_time='1 hour': must be \"DD:HH:MM:SS\""),
        ({"max_time": {"hour": 1}}, "max_time"),
        ({"weights_summary": "all"}, "weights_summary='all'"),
        ({"progress_bar_refresh_rate": -1}, "progress_bar_refresh_rate=-1"),
        ({"deterministic": "yes"}, "deterministic='yes'"),
        ({"log_every_n_steps": -1}, "log_every_n_steps=-1"),
        ({"enable_checkpointing": "best"}, "enable_checkpointing='best': must be True, False or a ModelCheckpoint"),
        ({"callbacks": [object()]}, "callbacks holds a object"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(arguments, message):
    with pytest.raises(pl.ConfigError, match=message):
        pl.Trainer(**arguments)


def test_a_switch_and_a_callback_that_contradict_each_other_are_an_error():
    with pytest.raises(pl.ConfigError, match="enable_checkpointing=False, but callbacks holds a ModelCheckpoint"):
        pl.Trainer(enable_checkpointing=False, callbacks=[pl.ModelCheckpoint()])


@pytest.mark.parametrize("gpus", [8, "0,1,2,3,4,5,6,7", list(range(8))])
def test_gpus_and_nodes_multiply(gpus, monkeypatch):
    # No such cluster is here: the plan alone tells, as on a driver without a GPU that is connected to one.
    monkeypatch.setattr("raylit.trainer.arguments.workers.is_on_cluster", lambda: True)
    workers = plan_of(gpus=gpus, num_nodes=32).workers
    assert (workers.num_workers, workers.num_nodes, workers.accelerator.name) == (256, 32, "cuda")


def test_processes_and_nodes_multiply():
    workers = plan_of(num_processes=8, num_nodes=128).workers
    assert (workers.num_workers, workers.num_nodes, workers.accelerator.name) == (1024, 128, "cpu")


def test_more_processes_than_there_are_hosts_for_is_a_clear_error(quiet):
    trainer = pl.Trainer(num_processes=8, num_nodes=128, **quiet)
    with pytest.raises(pl.ResourcesError, match=r"128 hosts?.*this cluster of 1 host|1024 workers"):
        trainer.fit(Regression(), RegressionData())


@pytest.mark.parametrize(
    "given", ["00:01:30:00", timedelta(hours=1, minutes=30), {"hours": 1, "minutes": 30}, {"minutes": 90}]
)
def test_max_time_has_three_forms_and_takes_the_limit_off_epochs(given):
    limits = plan_of(max_time=given).limits
    assert (limits.max_time_s, limits.max_epochs) == (5400.0, None)
    assert plan_of(max_time=given, max_epochs=3).limits.max_epochs == 3


@pytest.mark.parametrize(
    ("arguments", "max_epochs", "max_steps"),
    [
        ({}, 1000, None),
        ({"max_steps": 10}, None, 10),
        ({"max_epochs": -1}, None, None),
        ({"max_epochs": 0}, 0, None),
        ({"max_epochs": 2, "max_steps": 7}, 2, 7),
    ],
)
def test_a_thousand_epochs_are_the_limit_where_no_other_is_given(arguments, max_epochs, max_steps):
    limits = plan_of(**arguments).limits
    assert (limits.max_epochs, limits.max_steps) == (max_epochs, max_steps)


def test_optimization_arguments_reach_the_plan():
    optimization = plan_of(
        accumulate_grad_batches={2: 4, 5: 8},
        gradient_clip_val=0,
        track_grad_norm="inf",
        truncated_bptt_steps=5,
        terminate_on_nan=True,
        detect_anomaly=True,
    ).optimization
    assert optimization.accumulation == ((0, 1), (2, 4), (5, 8))
    assert optimization.clip_val is None
    assert optimization.grad_norm_order == float("inf")
    assert optimization.truncated_steps == 5
    assert optimization.is_ending_on_nan
    assert optimization.is_detecting_anomaly
    assert plan_of(track_grad_norm=2).optimization.grad_norm_order == 2.0
    assert plan_of().optimization.grad_norm_order is None


def test_data_arguments_reach_the_plan():
    plan = plan_of(overfit_batches=3, prepare_data_per_node=False, reload_dataloaders_every_n_epochs=2)
    assert plan.limits.overfit_batches == 3
    assert not plan.prepares_per_node
    assert plan.reload_loaders_every_n_epochs == 2


def test_strategies_of_lightning_say_how_ddp_is_to_run():
    plan = plan_of(num_workers=2, strategy="ddp_find_unused_parameters_true", sync_batchnorm=True)
    assert plan.strategy == pl.DDPStrategy(find_unused_parameters=True)
    assert plan.is_syncing_batchnorm
    assert plan_of(num_workers=2, strategy="auto").strategy == pl.DDPStrategy(find_unused_parameters="auto")
    for name in ("ddp_spawn", "ddp_spawn_find_unused_parameters_false"):
        assert plan_of(num_workers=2, strategy=name).strategy == pl.DDPStrategy()


@pytest.mark.parametrize("name", ["early_stop_callback", "early_stop_checkpoint"])
def test_early_stopping_of_the_page_follows_val_loss(name):
    stopping = pl.Trainer(**{name: True}).early_stopping_callback
    assert isinstance(stopping, pl.EarlyStopping)
    own = pl.EarlyStopping("other")
    assert pl.Trainer(**{name: own}).early_stopping_callback is own
    assert pl.Trainer(**{name: True}, callbacks=[own]).callbacks.count(own) == 1


def test_a_callback_may_stand_in_a_switchs_place():
    checkpoint = pl.ModelCheckpoint(save_last=True)
    assert pl.Trainer(checkpoint_callback=checkpoint).checkpoint_callback is checkpoint
    assert pl.Trainer(checkpoint_callback=False).checkpoint_callback is None


def test_none_stands_for_the_default_as_in_lightning():
    nothing = dict.fromkeys(
        ["limit_train_batches", "val_check_interval", "num_sanity_val_steps", "logger", "enable_progress_bar"]
    )
    assert plan_of(**nothing) == plan_of()


def test_two_names_of_fits_and_tests_loaders_may_not_differ(quiet):
    data = RegressionData()
    data.setup()
    first, second = data.train_dataloader(), data.train_dataloader()
    trainer = pl.Trainer(max_epochs=1, **quiet)
    with pytest.raises(pl.ConfigError, match="train_dataloaders and train_dataloader are two names"):
        trainer.fit(Regression(), first, train_dataloader=second)
    with pytest.raises(pl.ConfigError, match="dataloaders and test_dataloaders are two names"):
        trainer.test(Regression(), first, test_dataloaders=second)


def test_arguments_come_from_the_command_line():
    parser = pl.Trainer.add_argparse_args(ArgumentParser())
    given = parser.parse_args(
        [
            *("--max_epochs", "3", "--gpus", "0", "--limit_train_batches", "0.5", "--limit_val_batches", "4"),
            *("--fast_dev_run", "--precision", "bf16", "--deterministic", "true", "--default_root_dir", "here"),
        ]
    )
    trainer = pl.Trainer.from_argparse_args(given, fast_dev_run=False, logger=False)
    plan = trainer._plan
    assert (plan.limits.max_epochs, plan.limits.train_batches, plan.limits.val_batches) == (3, 0.5, 4)
    assert isinstance(plan.limits.val_batches, int)
    assert (plan.optimization.precision, plan.deterministic, plan.default_root_dir) == ("bf16-mixed", True, "here")
    assert not plan.is_dev_run
    assert pl.Trainer.from_argparse_args(parser.parse_args(["--fast_dev_run"]))._plan.is_dev_run
    assert pl.Trainer.from_argparse_args(parser.parse_args([]))._plan == plan_of()


def test_the_command_line_is_lightning_09s(monkeypatch):
    """A parser with the user's own options in, the same one out; names of its time; other options are left alone."""
    parser = ArgumentParser()
    parser.add_argument("--batch_size", type=int, default=32)
    assert pl.Trainer.add_argparse_args(parser) is parser
    words = [
        *("--batch_size", "8", "--max_epochs", "3", "--progress_bar_refresh_rate", "0", "--distributed_backend", "ddp"),
        *("--early_stop_checkpoint", "--gpus", "", "--accumulate_grad_batches", "{2: 4}"),
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    args = parser.parse_args()
    for given in (args, parser):
        trainer = pl.Trainer.from_argparse_args(given, max_epochs=4)
        assert trainer.max_epochs == 4  # an override wins
        assert trainer._plan.optimization.accumulation == ((0, 1), (2, 4))
        assert trainer.early_stopping_callback is not None
        assert not any(isinstance(callback, pl.ProgressBar) for callback in trainer.callbacks)
    assert args.batch_size == 8
    with pytest.raises(pl.ConfigError, match=r"precision='bf17': must be one of 32, 64, 16"):
        pl.Trainer.from_argparse_args(parser.parse_args(["--precision", "bf17"]))
    with pytest.raises(pl.ConfigError, match=r"limit_train_batches='half': must be a float in \[0, 1\]"):
        pl.Trainer.from_argparse_args(parser.parse_args(["--limit_train_batches", "half"]))
