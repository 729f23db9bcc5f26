"""The module's training_step with the arguments that its kind of optimization gives it. Worker."""

from collections.abc import Callable
from typing import Any

from raylit.errors import ModuleError
from raylit.module import LightningModule
from raylit.worker.signatures import accepting_index, num_positional


def step_of(module: LightningModule, *, optimizer_idx: int | None, is_truncated: bool) -> Callable[..., Any]:
    """(batch, batch_idx[, hiddens]) to what `training_step` returns, for one of several optimizers or the only one.

    ModuleError: the step lacks an argument that it needs.
    """
    step = module.training_step
    wanted = ["batch", "batch_idx"]
    if optimizer_idx is not None:
        wanted.append("optimizer_idx")
    if is_truncated:
        wanted.append("hiddens")
    if len(wanted) == 2:
        return accepting_index(step)
    if num_positional(step) < len(wanted):
        reason = "configure_optimizers returns several optimizers" if optimizer_idx is not None else ""
        more = "truncated back-propagation is on" if is_truncated else ""
        raise ModuleError(
            f"{type(module).__name__}.training_step must take ({', '.join(wanted)}), as "
            f"{' and '.join(filter(None, [reason, more]))}; or set automatic_optimization = False"
        )
    if optimizer_idx is None:
        return step

    def step_of_optimizer(batch: Any, batch_idx: int, *hiddens: Any) -> Any:
        return step(batch, batch_idx, optimizer_idx, *hiddens)

    return step_of_optimizer
