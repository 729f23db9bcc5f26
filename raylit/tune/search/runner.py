"""Runner of a search's trials one by one, and the run of a single trial. Driver and trial processes."""

import gc
from functools import partial
from typing import Any, Protocol

from raylit.tune.search.out_of_memory import classify_failure, drop_tracebacks
from raylit.tune.search.trial import Experiment, Outcome, ReportLoss, Search, copy_job, fit_trial
from raylit.worker.job import Job


class Runner(Protocol):
    """Way to run the trials of a search."""

    def run(self, search: Search, experiment: Experiment, job: Job) -> None:
        """Run a trial for each value that the search proposes. Raises an error that every trial would raise."""
        ...


class DirectRunner:
    """Runner of one trial after the other, on the workers of an ordinary fit; with `num_workers=0` in this process."""

    def run(self, search: Search, experiment: Experiment, job: Job) -> None:
        """Run a trial for each value that the search proposes. Raises an error that every trial would raise."""
        while (value := search.propose()) is not None:
            search.receive(value, run_trial(experiment, value, job, report_loss=partial(search.is_losing, value)))


def run_trial(experiment: Experiment, value: Any, job: Job, *, report_loss: ReportLoss) -> Outcome:
    """Run a trial with a copy of the job and return its outcome.

    An error that comes from this trial's value is part of the outcome; any other error is raised.
    """
    accelerator = experiment.plan.workers.accelerator
    try:
        return fit_trial(experiment, value, job=copy_job(job), report_loss=report_loss)
    except Exception as error:
        failure = classify_failure(error, accelerator)
        if failure is None:
            raise
        outcome = Outcome(error=drop_tracebacks(error), failure=failure)
    # This stands outside of the except clause, which keeps the failed step's frames and with them its tensors.
    gc.collect()
    accelerator.empty_cache()
    return outcome
