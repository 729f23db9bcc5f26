"""Find the run of a user's function by Ray Tune or Ray Train that this process is part of. Driver.

Written against Ray 2.60, which has no public word on whether there is one. Importing either takes seconds, and what has
not been imported is not in use: `sys.modules` tells. A name that another version lacks is a RaylitError.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from raylit.compat.private_names import explain_missing, import_private
from raylit.errors import RaylitError

_VERSION = "2.60"


def find_function_session() -> Any | None:
    """Find the session of a function trainable of Tune, or of a worker of Train's first version."""
    module = "ray.train._internal.session"
    return import_private(module, "get_session", written_for=_VERSION)() if module in sys.modules else None


def find_train_functions() -> Any | None:
    """Find what the public functions of Train's second version stand for in this process, one of its workers."""
    module = "ray.train.v2._internal.execution.train_fn_utils"
    return import_private(module, "_train_fn_utils", written_for=_VERSION) if module in sys.modules else None


def count_train_reports() -> int:
    """Count the reports of this worker of Train's second version; 0 in Train's local mode, which does not count."""
    module = "ray.train.v2._internal.execution.context"
    context = import_private(module, "_train_context", written_for=_VERSION)
    return 0 if context is None else int(context.report_call_index)


def read_trial_config(session: Any) -> Mapping[str, Any]:
    """Read what Tune has called the function of this session with; empty where it is not Tune's."""
    target = getattr(session.training_thread, "_target", None)
    if not inspect.isfunction(target):
        raise RaylitError(explain_missing("ray.train._internal.session.RunnerThread._target", written_for=_VERSION))
    # The target is a lambda: self._trainable_func(self.config), self being Tune's trainable.
    trainable = inspect.getclosurevars(target).nonlocals.get("self")
    return getattr(trainable, "config", None) or {}
