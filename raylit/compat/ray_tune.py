"""Private names of Ray Tune, each behind one function. Driver.

Written for Ray 2.60. A missing name is a RaylitError, or is ignored if it only saves time.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping

from ray import tune
from ray.tune.experiment import Trial

from raylit.compat.private_names import explain_missing, import_private
from raylit.errors import RaylitError

_VERSION = "2.60"


def has_metric(algorithm: object) -> bool:
    """Return True if a scheduler or searcher of Tune has a metric; False if the private name is missing.

    Only searchers have a public property for it.
    """
    return getattr(algorithm, "metric", None) is not None or getattr(algorithm, "_metric", None) is not None


def list_trials(results: tune.ResultGrid) -> list[Trial]:
    """Return the trials of Tune's results, with their states and checkpoints, which the public results leave out."""
    analysis = getattr(results, "_experiment_analysis", None)
    if analysis is None:
        raise RaylitError(explain_missing("ray.tune.ResultGrid._experiment_analysis", written_for=_VERSION))
    return list(analysis.trials)


@contextlib.contextmanager
def set_trial_variables(variables: Mapping[str, str], *, is_pooled: bool) -> Iterator[None]:
    """Give the processes of trials that start within this context these environment variables.

    Tune adds some of its own, and passes on some of this process's. For variables Ray starts new processes, with two
    more starts of Python, where trials without any use prestarted ones. `is_pooled`: leave Tune's variables out, unless
    this process has some to pass on.

    Without the private names Tune's variables apply and none of raylit's; that is an error if the trials need some.
    """
    try:
        module = import_private("ray.tune.execution", "class_cache", written_for=_VERSION)
        names, defaults = module.ENV_VARS_TO_PROPAGATE, dict(module.DEFAULT_ENV_VARS)
    except (RaylitError, AttributeError):
        if variables:
            raise
        yield
        return
    if is_pooled or not names & os.environ.keys():
        module.DEFAULT_ENV_VARS.clear()
        module.ENV_VARS_TO_PROPAGATE = set()
    module.DEFAULT_ENV_VARS.update(variables)
    try:
        yield
    finally:
        module.DEFAULT_ENV_VARS.clear()
        module.DEFAULT_ENV_VARS.update(defaults)
        module.ENV_VARS_TO_PROPAGATE = names
