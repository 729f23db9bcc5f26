"""The HParams page of a sweep, as TensorBoard's own plugin reads it."""

import contextlib

import pytest
from models import Regression, RegressionData
from ray import tune
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

import raylit as pl
from raylit.loggers import TensorBoardLogger
from raylit.tune.sweep.tensorboard_hparams import HParamsSession, write_experiment


def page_of(directory, metric):
    """The experiment, and the rows as (hyper-parameters, metrics, status), the least `best/METRIC` first."""
    runs = EventMultiplexer().AddRunsFromDirectory(str(directory))
    runs.Reload()
    here = context.RequestContext()
    page = backend_context.Context(base_plugin.TBContext(data_provider=MultiplexerDataProvider(runs, str(directory))))
    experiment = page.experiment_from_metadata(here, "", True, page.hparams_metadata(here, ""), [])
    statuses = [api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    request = api_pb2.ListSessionGroupsRequest(slice_size=100, allowed_statuses=statuses, include_metrics=True)
    request.col_params.add(metric=api_pb2.MetricName(tag=f"best/{metric}"), order=api_pb2.ORDER_ASC)
    for parameter in experiment.hparam_infos:
        request.col_params.add(hparam=parameter.name)
    answer = list_session_groups.Handler(here, page, "", request).run()
    rows = []
    for group in answer.session_groups:
        (session,) = group.sessions
        hparams = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
        metrics = {value.name.tag: value.value for value in group.metric_values}
        rows.append((hparams, metrics, session.status))
    return experiment, rows


class Fails(Regression):
    def on_train_epoch_end(self):
        raise ValueError("on purpose")


def test_each_trial_writes_a_session_with_its_config_and_best_value(tmp_path, quiet):
    space = {
        "lr": tune.loguniform(1e-5, 1.0),
        "net": {"width": tune.grid_search([8, 16]), "kind": tune.choice(["mlp", "cnn"])},
        "depth": tune.randint(1, 5),
        "data": "digits",
    }
    write_experiment(str(tmp_path), space, metric="val_loss")
    bests = {}
    for index, (lr, model) in enumerate([(0.05, Regression), (1e-6, Regression), (0.01, Fails)]):
        config = {"lr": lr, "net": {"width": 8, "kind": "mlp"}, "depth": 2, "data": "digits"}
        logger = TensorBoardLogger(tmp_path / f"trial_{index}", name="", version="", default_hp_metric=False)
        session = HParamsSession(config, name=f"trial_{index}", logger=logger, metric="val_loss", mode="min")
        trainer = pl.Trainer(max_epochs=3, num_workers=0, callbacks=[session], **{**quiet, "logger": logger})
        with contextlib.suppress(ValueError):
            trainer.fit(model(lr=lr), RegressionData())
        bests[lr] = session._best
    experiment, rows = page_of(tmp_path, "val_loss")
    columns = {info.name: info.WhichOneof("domain") for info in experiment.hparam_infos}
    assert columns == {
        "lr": "domain_interval",
        "net/width": "domain_discrete",
        "net/kind": "domain_discrete",
        "depth": "domain_interval",
    }
    assert [info.name.tag for info in experiment.metric_infos] == ["best/val_loss", "val_loss"]
    assert [hparams["lr"] for hparams, _, _ in rows] == sorted(bests, key=bests.__getitem__)
    for hparams, metrics, status in rows:
        assert metrics["best/val_loss"] == pytest.approx(bests[hparams["lr"]])
        assert metrics["val_loss"] >= metrics["best/val_loss"]
        assert (hparams["net/kind"], hparams["data"]) == ("mlp", "digits")
        assert status == (api_pb2.STATUS_FAILURE if hparams["lr"] == 0.01 else api_pb2.STATUS_SUCCESS)
