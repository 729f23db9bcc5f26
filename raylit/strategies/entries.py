"""Entries: the methods that run a sharded model, around the outermost of which its own parameters are gathered. Worker.

torch's own hooks, and `register_fsdp_forward_method`, take a step that calls `self(x)`, or another step, for two
forward passes, and let go of the parameters after the inner one.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

from torch import nn

from raylit.compat.torch_fsdp import get_state, remove_forward_hooks, run_post_forward, run_pre_forward
from raylit.errors import ModuleError
from raylit.strategies.base import TrainingStep
from raylit.strategies.skipping import Course

_CALL = "forward"


class Entries:
    """Those of one module, until `restore`."""

    def __init__(self, module: nn.Module, *, steps: Sequence[str], is_manual: bool) -> None:
        """`is_manual`: backward passes and steps are in `training_step`, around which nothing can be gathered then."""
        self._module = module
        self._state: Any = get_state(module)
        self._is_running = False
        self._course: Course | None = None
        """Of the training step that runs."""
        remove_forward_hooks(self._state)
        self._names = [*steps, _CALL]
        for name in self._names:
            own = getattr(module, name)
            if name == "training_step":
                setattr(module, name, _explaining(own) if is_manual else self._entering(self._skippable(own)))
            else:
                setattr(module, name, self._entering(own))

    def restore(self) -> None:
        for name in self._names:
            del vars(self._module)[name]

    def run_on(self, course: Course, training_step: TrainingStep, *args: Any) -> Any:
        """The step, which may skip its batch where the others run theirs."""
        self._course = course
        try:
            return training_step(*args)
        finally:
            self._course = None

    def _skippable(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        def step(*args: Any, **kwargs: Any) -> Any:
            course, self._course = self._course, None
            return own(*args, **kwargs) if course is None else course.run(partial(own, **kwargs), *args)

        return step

    def _entering(self, own: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(own)
        @_explaining
        def entered(*args: Any, **kwargs: Any) -> Any:
            if self._is_running:
                return own(*args, **kwargs)
            self._is_running = True
            try:
                args, kwargs = run_pre_forward(self._state, self._module, args, kwargs)
                return run_post_forward(self._state, self._module, args, own(*args, **kwargs))
            finally:
                self._is_running = False

        return entered


def _explaining(own: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of torch's word on shards in a computation."""

    @wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            return own(*args, **kwargs)
        except RuntimeError as error:
            if "mixed torch.Tensor and DTensor" not in str(error):
                raise
            raise ModuleError(
                "a parameter was used while strategy='fsdp' had not gathered it. A part's parameters are there while "
                "it is called, self.part(x), and not where other code takes them: call the part, give an "
                "auto_wrap_policy whose classes keep together what is used together, or use strategy='ddp'"
            ) from error

    return step
