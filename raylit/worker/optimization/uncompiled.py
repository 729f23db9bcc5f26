"""without_compiler: optimizers without torch's compiler, which they import to keep out of its way. Worker.

It takes 0.7 s of a start and 40 MB, in each process. Where something is compiled, it is imported all the same.
"""

import contextlib
import sys
from collections.abc import Iterator

from torch.optim import Optimizer

_COMPILER = "torch._dynamo"
_KEPT_OUT_OF = ("add_param_group", "load_state_dict", "state_dict")
_CACHE = "__dynamo_disable"
"""Where torch keeps what it has made of one of these for the compiler's sake (torch 2.13)."""


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Optimizers are made, saved and restored in here."""
    if _COMPILER in sys.modules:
        yield
        return
    inner = [getattr(getattr(Optimizer, name), "__wrapped__", None) for name in _KEPT_OUT_OF]
    functions = [function for function in inner if function is not None and not hasattr(function, _CACHE)]
    for function in functions:
        setattr(function, _CACHE, function)
    try:
        yield
    finally:
        # What is compiled later on is to find the compiler's own.
        for function in functions:
            delattr(function, _CACHE)
