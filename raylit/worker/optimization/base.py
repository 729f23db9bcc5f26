"""Optimization: what the training loop asks of each kind of it. Worker."""

from typing import Any, Protocol


class Optimization(Protocol):
    """From a batch to gradients and, at the end of a window of batches, to new weights."""

    num_outputs: int
    """What `training_step` returns for one batch: 1, or with several optimizers a list of so many."""

    def start_epoch(self, *, window: int) -> None:
        """`window`: batches whose gradients are added up before a step."""
        ...

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        """A batch that counts as much as those of the other ranks. Returns what `training_step` did; with several
        optimizers a list of that. `extra`: its last arguments."""
        ...

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        """A batch of an uneven split, whose loss counts by `weight`, or None: this rank has no part of it."""
        ...

    def finish_window(self) -> bool:
        """Step with what has been added up; for a loader whose end came unforeseen. True: there was something."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The gradients of a window that has begun, by the names of their parameters; empty between two windows."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def is_active(self, optimizer_idx: int | None) -> bool:
        """Whether that optimizer has its turn in the batch just run."""
        ...

    def hiddens_of(self, outputs: Any) -> Any:
        """What `outputs` of `run_batch` carry to the next piece of a sequence, detached."""
        ...
