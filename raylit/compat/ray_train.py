"""Lookup of the Ray Tune or Ray Train session that runs a function in this process. Driver.

Written for Ray 2.60, which has no public API for it. Importing either takes seconds, and what has not been imported is
not in use, as `sys.modules` shows. A missing name is a RaylitError.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from raylit.compat.private_names import explain_missing, import_private
from raylit.errors import RaylitError

_VERSION = "2.60"


def find_function_session() -> Any | None:
    """Return the session of a function trainable of Tune, or of a worker of Train's first version, or None."""
    module = "ray.train._internal.session"
    return import_private(module, "get_session", written_for=_VERSION)() if module in sys.modules else None


def find_train_functions() -> Any | None:
    """Return the functions of Train's second version, if this process is one of its workers, or None."""
    module = "ray.train.v2._internal.execution.train_fn_utils"
    return import_private(module, "_train_fn_utils", written_for=_VERSION) if module in sys.modules else None


def count_train_reports() -> int:
    """Return the number of reports of this worker of Train's second version; 0 in its local mode."""
    module = "ray.train.v2._internal.execution.context"
    context = import_private(module, "_train_context", written_for=_VERSION)
    return 0 if context is None else int(context.report_call_index)


def read_trial_config(session: Any) -> Mapping[str, Any]:
    """Return the config that Tune has called the session's function with; empty if the session is not Tune's."""
    target = getattr(session.training_thread, "_target", None)
    if not inspect.isfunction(target):
        raise RaylitError(explain_missing("ray.train._internal.session.RunnerThread._target", written_for=_VERSION))
    # The target is a lambda: self._trainable_func(self.config), where self is Tune's trainable.
    trainable = inspect.getclosurevars(target).nonlocals.get("self")
    return getattr(trainable, "config", None) or {}
