"""Runner: who runs the trials of a search; DirectRunner does so one by one, from this process. Driver."""

import gc
from typing import Any, Protocol

import torch

from raylit.tune.attempt import Experiment, Outcome, Search, attempt, copied
from raylit.tune.memory import verdict_on, without_traces


class Runner(Protocol):
    def run(self, search: Search, experiment: Experiment) -> None:
        """Try what the search proposes until it proposes no more. Raises what is wrong with every trial."""
        ...


class DirectRunner:
    """One trial after the other, on the workers of an ordinary fit; with `num_workers=0` in this process."""

    def run(self, search: Search, experiment: Experiment) -> None:
        while (value := search.propose()) is not None:
            search.receive(value, _tried(search, experiment, value))


def _tried(search: Search, experiment: Experiment, value: Any) -> Outcome:
    try:
        return attempt(
            experiment,
            value,
            job=copied(experiment.job),
            told=lambda step, loss: search.is_losing(value, step, loss),
        )
    except Exception as error:
        verdict = verdict_on(error)
        if verdict is None:
            raise
        outcome = Outcome(error=without_traces(error), verdict=verdict)
    # Outside of the except clause, which keeps the failed step's frames and with them its tensors.
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return outcome
