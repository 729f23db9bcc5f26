"""SeveralOptimizers: each has its turn on every batch, or for some batches, with the others' parameters frozen."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from raylit.worker.optimization.base import Optimization
from raylit.worker.optimization.handles import Handles
from raylit.worker.view import TrainerView


class SeveralOptimizers:
    """Automatic optimization as Lightning had it before 2.0: `training_step(batch, batch_idx, optimizer_idx)`."""

    def __init__(
        self, turns: list[Optimization], *, handles: Handles, frequencies: tuple[int, ...] | None, view: TrainerView
    ) -> None:
        self.num_outputs = len(turns)
        self._turns = turns
        self._handles = handles
        self._view = view
        self._borders = None if frequencies is None else list(accumulate(frequencies))
        self._active = range(len(turns))

    def start_epoch(self, *, window: int) -> None:
        for turn in self._turns:
            turn.start_epoch(window=window)

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        outputs = self._in_turn(lambda turn, own: turn.run_batch(batch, batch_idx, is_window_end, *own), extra)
        if is_window_end:
            self._handles.end_batch()
        return outputs

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        return self._in_turn(lambda turn, own: turn.run_share(batch, batch_idx, is_window_end, weight, *own), extra)

    def finish_window(self) -> bool:
        is_stepped = any([turn.finish_window() for turn in self._turns])
        self._handles.end_batch()
        return is_stepped

    def state_dict(self) -> dict[str, Any]:
        states = {str(index): turn.state_dict() for index, turn in enumerate(self._turns)}
        return {index: state for index, state in states.items() if state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, turn in enumerate(self._turns):
            turn.load_state_dict(state.get(str(index), {}))

    def is_active(self, optimizer_idx: int | None) -> bool:
        return optimizer_idx is None or optimizer_idx in self._active

    def hiddens_of(self, outputs: Any) -> Any:
        return [turn.hiddens_of(output) for turn, output in zip(self._turns, outputs, strict=True)]

    def _in_turn(self, run: Callable[[Optimization, tuple[Any, ...]], Any], extra: tuple[Any, ...]) -> list[Any]:
        """What the step returned for each optimizer, None for those without a turn."""
        outputs: list[Any] = [None] * len(self._turns)
        self._active = self._now_active()
        for index in self._active:
            optimizer = self._handles.optimizers[index]
            self._handles.toggle(optimizer)
            try:
                # Of several optimizers' hiddens each gets its own.
                outputs[index] = run(
                    self._turns[index], tuple(one[index] if one is not None else None for one in extra)
                )
            finally:
                self._handles.untoggle(optimizer)
        return outputs

    def _now_active(self) -> range:
        if self._borders is None:
            return range(len(self._turns))
        place = self._view.num_batches_in_all % self._borders[-1]
        index = next(index for index, border in enumerate(self._borders) if place < border)
        return range(index, index + 1)
