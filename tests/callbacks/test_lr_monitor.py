"""LearningRateMonitor: names, values and when they are logged."""

import pytest
import torch
from models import Regression, fit

import raylit as pl
from raylit.loggers.base import Logger


class Kept(Logger):
    """Keeps what it is given."""

    def __init__(self):
        self.rows = []

    @property
    def log_dir(self):
        return None

    @property
    def version(self):
        return 0

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, params):
        pass

    def of(self, name):
        return [(step, pytest.approx(metrics[name])) for step, metrics in self.rows if name in metrics]

    @property
    def names(self):
        return {name for _, metrics in self.rows for name in metrics if name.startswith(("lr-", "mine"))}


def logged(configure, *, num_workers=0, log_every_n_steps=2, callbacks=(), **arguments):
    """12 steps in 2 epochs, with what `configure(module)` returns."""

    class Module(Regression):
        def configure_optimizers(self):
            return configure(self)

    logger = Kept()
    monitor = pl.LearningRateMonitor(**arguments)
    fit(
        Module(),
        num_workers=num_workers,
        callbacks=[monitor, *callbacks],
        logger=logger,
        log_every_n_steps=log_every_n_steps,
        enable_model_summary=False,
    )
    return logger, monitor


def adam(module, **arguments):
    return torch.optim.Adam(module.parameters(), lr=0.1, **arguments)


def halving(optimizer, **config):
    return {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5), **config}


def stepwise(module):
    optimizer = adam(module)
    return {"optimizer": optimizer, "lr_scheduler": halving(optimizer, interval="step")}


def epochwise(module):
    optimizer = adam(module)
    return {"optimizer": optimizer, "lr_scheduler": halving(optimizer)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_step_schedule_is_logged_at_each_logging_step(num_workers):
    logger, monitor = logged(stepwise, num_workers=num_workers)
    # The step with index n has run with the rate that n steps of the scheduler have left.
    assert logger.of("lr-Adam") == [(step, 0.1 * 0.5**step) for step in (1, 3, 5, 7, 9, 11)]
    assert monitor.lrs == {"lr-Adam": pytest.approx([0.1 * 0.5**step for step in (1, 3, 5, 7, 9, 11)])}


def test_an_epoch_schedule_is_logged_once_an_epoch():
    logger, _ = logged(epochwise)
    assert logger.of("lr-Adam") == [(5, 0.1), (11, 0.05)]


def test_the_logging_interval_can_be_set():
    logger, _ = logged(epochwise, logging_interval="step")
    assert logger.of("lr-Adam") == [(1, 0.1), (3, 0.1), (5, 0.1), (7, 0.05), (9, 0.05), (11, 0.05)]
    logger, _ = logged(stepwise, logging_interval="epoch")
    assert logger.of("lr-Adam") == [(5, 0.1), (11, 0.1 * 0.5**6)]


def test_without_a_scheduler_it_is_logged_at_logging_steps():
    logger, _ = logged(adam, log_every_n_steps=5)
    assert logger.of("lr-Adam") == [(4, 0.1), (9, 0.1)]


def test_parameter_groups_have_numbers_or_names_of_their_own():
    def grouped(module):
        return torch.optim.SGD(
            [{"params": module.net[0].parameters()}, {"params": module.net[3].parameters(), "name": "head"}], lr=0.1
        )

    assert logged(grouped)[0].names == {"lr-SGD/pg1", "lr-SGD/head"}


def test_names_that_two_groups_share_are_an_error():
    def grouped(module):
        groups = [{"params": module.net[index].parameters(), "name": "same"} for index in (0, 3)]
        return torch.optim.SGD(groups, lr=0.1)

    with pytest.raises(pl.ConfigError, match="share a name"):
        logged(grouped)


def test_a_second_optimizer_of_a_kind_is_counted_and_a_schedulers_name_wins():
    def several(module):
        left, right = adam(module), adam(module)
        named = torch.optim.SGD(module.parameters(), lr=0.1)
        return [left, right, named], [halving(named, name="mine", interval="step")]

    class Several(Regression):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return several(self)

    logger = Kept()
    fit(Several(), callbacks=pl.LearningRateMonitor(), logger=logger, log_every_n_steps=2)
    assert logger.names == {"lr-Adam", "lr-Adam-1", "mine"}


def test_momentum_and_weight_decay_are_logged_on_demand():
    logger, _ = logged(lambda module: adam(module, weight_decay=0.25), log_momentum=True, log_weight_decay=True)
    assert logger.of("lr-Adam-momentum")[0] == (1, 0.9)
    assert logger.of("lr-Adam-weight_decay")[0] == (1, 0.25)

    def sgd(module):
        return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)

    assert logged(sgd, log_momentum=True)[0].of("lr-SGD-momentum")[0] == (1, 0.5)
    assert logged(adam)[0].names == {"lr-Adam"}


def test_a_group_that_is_added_renames_the_first():
    class Adds(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": pl_module.net[3].parameters(), "lr": 0.3})

    def first(module):
        return torch.optim.Adam(module.net[0].parameters(), lr=0.1)

    logger, monitor = logged(first, callbacks=[Adds()], log_every_n_steps=3)
    assert logger.of("lr-Adam") == [(2, 0.1), (5, 0.1)]
    assert logger.of("lr-Adam/pg2") == [(8, 0.3), (11, 0.3)]
    assert monitor.lrs == {"lr-Adam/pg1": [0.1] * 4, "lr-Adam/pg2": [0.3] * 2}


def test_an_accumulated_step_is_logged_once():
    logger = Kept()
    fit(Regression(), callbacks=pl.LearningRateMonitor(), logger=logger, log_every_n_steps=2, accumulate_grad_batches=3)
    assert logger.of("lr-SGD") == [(1, 0.05), (3, 0.05)]


def test_a_missing_logger_or_an_unknown_interval_is_an_error():
    with pytest.raises(pl.ConfigError, match="has no logger"):
        pl.Trainer(callbacks=pl.LearningRateMonitor(), logger=False)
    pl.Trainer(callbacks=pl.LearningRateMonitor(), fast_dev_run=True)
    with pytest.raises(pl.ConfigError, match="logging_interval='batch'"):
        pl.LearningRateMonitor("batch")
