"""Runner: who runs the trials of a search; DirectRunner does so one by one, from this process. Driver."""

import gc
from functools import partial
from typing import Any, Protocol

from raylit.config.plan import Plan
from raylit.tune.search.out_of_memory import classify_failure, without_tracebacks
from raylit.tune.search.trial import Experiment, Outcome, ReportLoss, Search, copy_job, fit_trial
from raylit.worker.job import Job


class Runner(Protocol):
    def run(self, search: Search, experiment: Experiment, job: Job) -> None:
        """Try what the search proposes until it proposes no more. Raises what is wrong with every trial."""
        ...


def build_runner(plan: Plan, *, is_shown: bool) -> Runner:
    """Ray Tune where there are workers and this process is none of Ray's: a task or trial trains in its own room."""
    if plan.workers.num_workers > 0:
        # Ray takes half a second to import, its tune three more.
        from raylit.driver.ray import local_cluster

        local_cluster.connect()
        if not local_cluster.is_in_worker():
            from raylit.tune.search.ray_tune_runner import TuneRunner

            return TuneRunner(is_shown=is_shown)
    return DirectRunner()


class DirectRunner:
    """One trial after the other, on the workers of an ordinary fit; with `num_workers=0` in this process."""

    def run(self, search: Search, experiment: Experiment, job: Job) -> None:
        while (value := search.propose()) is not None:
            search.receive(value, run_trial(experiment, value, job, told=partial(search.is_losing, value)))


def run_trial(experiment: Experiment, value: Any, job: Job, *, told: ReportLoss) -> Outcome:
    """A trial with a copy of the job. What is wrong with this one alone is its outcome; else it is raised."""
    accelerator = experiment.plan.workers.accelerator
    try:
        return fit_trial(experiment, value, job=copy_job(job), told=told)
    except Exception as error:
        verdict = classify_failure(error, accelerator)
        if verdict is None:
            raise
        outcome = Outcome(error=without_tracebacks(error), verdict=verdict)
    # Outside of the except clause, which keeps the failed step's frames and with them its tensors.
    gc.collect()
    accelerator.empty_cache()
    return outcome
