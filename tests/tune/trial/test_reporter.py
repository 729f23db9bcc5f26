"""What a fit hands over to its trial, when, and how it obeys."""

import torch
from models import Regression, RegressionData

import raylit as pl
from raylit.tune.trial.trial_thread import IS_LAST, Reporter, TrainingEnd, TrialThread


class Fitted:
    """A fit in a trial's thread."""

    def __init__(self, quiet, *, model=None, datamodule=None, ckpt_path=None, **arguments):
        self.model = model or Regression()
        self.trainer = None

        def train(handover):
            self.trainer = pl.Trainer(
                num_workers=0, callbacks=Reporter(handover), **{"max_epochs": 3, **arguments}, **quiet
            )
            self.trainer.fit(self.model, datamodule or RegressionData(), ckpt_path=ckpt_path)

        self.handover = TrialThread(train)

    def reports(self):
        reports = []
        while not isinstance(answer := self.handover.next(), TrainingEnd):
            reports.append(answer.metrics)
        if answer.error is not None:
            raise answer.error
        return reports


def places(reports):
    return [(report["epoch"], report["step"], report[IS_LAST]) for report in reports]


def test_a_report_at_each_epochs_end_has_the_metrics_of_both_loops(quiet):
    reports = Fitted(quiet).reports()
    assert places(reports) == [(0, 6, False), (1, 12, False), (2, 18, True)]
    assert {"train_loss", "val_loss"} <= reports[0].keys()


def test_without_validation_epochs_are_reported(quiet):
    assert places(Fitted(quiet, limit_val_batches=0, max_epochs=2).reports()) == [(0, 6, False), (1, 12, True)]


def test_validations_inside_an_epoch_are_reported_each(quiet):
    reports = Fitted(quiet, val_check_interval=0.5, max_epochs=2).reports()
    assert places(reports) == [(0, 3, False), (0, 6, False), (1, 9, False), (1, 12, True)]


def test_epochs_without_validation_between_others_are_not_reported(quiet):
    assert [place[:2] for place in places(Fitted(quiet, check_val_every_n_epoch=2, max_epochs=4).reports())] == [
        (1, 12),
        (3, 24),
    ]


def test_a_training_that_ends_before_its_first_validation_reports_its_end(quiet):
    reports = Fitted(quiet, check_val_every_n_epoch=2, max_epochs=1, log_every_n_steps=1).reports()
    assert places(reports) == [(0, 6, True)]


def test_a_training_that_stops_itself_marks_its_last_report(quiet):
    reports = Fitted(quiet, max_steps=8).reports()
    assert places(reports)[-1] == (1, 8, True)


def test_a_stop_ends_the_fit_at_once_and_runs_its_last_hooks(quiet):
    ends = []

    class Ending(Regression):
        def on_fit_end(self):
            ends.append(self.trainer.global_step)

    fitted = Fitted(quiet, model=Ending(), max_epochs=50)
    fitted.handover.next()
    fitted.handover.next()
    fitted.handover.end()
    assert ends == [12]
    assert fitted.trainer.global_step == 12


def test_a_stop_is_obeyed_before_min_epochs(quiet):
    fitted = Fitted(quiet, max_epochs=50, min_epochs=40)
    fitted.handover.next()
    fitted.handover.end()
    assert fitted.trainer.global_step == 12


def test_a_resumed_training_has_the_result_of_an_uninterrupted_one(quiet, tmp_path):
    whole = Fitted(quiet)
    expected = whole.reports()
    torch.manual_seed(0)
    first = Fitted(quiet)
    first.handover.next()
    first.handover.save(str(tmp_path / "a.ckpt"))
    first.handover.end()
    second = Fitted(quiet, ckpt_path=str(tmp_path / "a.ckpt"))
    assert second.reports() == expected[1:]
    for own, others in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(own, others)
