"""Truncated back-propagation through pieces of a sequence, one after the other. Worker."""

from typing import Any

import torch

from raylit.core.module import LightningModule
from raylit.worker.data.batches import wrap_uneven
from raylit.worker.distributed.collectives import Collectives
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.optimization.base import Optimization


class TruncatedOptimization:
    """Optimization that splits a batch along time and runs each piece as a batch with the hiddens of the one before."""

    def __init__(
        self,
        inner: Optimization,
        *,
        module: LightningModule,
        length: int,
        collectives: Collectives,
        metrics: MetricBuffer,
    ) -> None:
        self.num_outputs = inner.num_outputs
        self._inner = inner
        self._metrics = metrics
        self._module = module
        self._length = length
        self._collectives = collectives

    def start_epoch(self, *, window: int) -> None:
        self._inner.start_epoch(window=window)

    def run_batch(self, batch: Any, batch_idx: int, is_window_end: bool, *extra: Any) -> Any:
        return self._run_pieces(batch, batch_idx, is_window_end, 1.0)

    def run_share(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float, *extra: Any) -> Any:
        return self._run_pieces(batch, batch_idx, is_window_end, weight)

    def finish_window(self) -> bool:
        return self._inner.finish_window()

    def state_dict(self) -> dict[str, Any]:
        return self._inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state)

    def is_active(self, optimizer_idx: int | None) -> bool:
        return self._inner.is_active(optimizer_idx)

    def read_hiddens(self, outputs: Any) -> Any:
        return None

    def _run_pieces(self, batch: Any, batch_idx: int, is_window_end: bool, weight: float) -> list[Any] | None:
        """Return the step's output for each piece; None if this rank has no batch."""
        pieces = [] if batch is None else list(self._module.tbptt_split_batch(batch, self._length))
        weights = self._weigh_pieces(len(pieces), weight)
        outputs: list[Any] = []
        hiddens = None
        self._metrics.is_piece = True
        for index, piece_weight in enumerate(weights):
            piece = pieces[index] if index < len(pieces) else None
            if piece_weight == 1.0:
                output = self._inner.run_batch(piece, batch_idx, is_window_end, hiddens)
            else:
                output = self._inner.run_share(piece, batch_idx, is_window_end, piece_weight, hiddens)
            if piece is not None:
                hiddens = self._inner.read_hiddens(output)
                outputs.append(output)
        self._metrics.is_piece = False
        return None if batch is None else outputs

    def _weigh_pieces(self, num_pieces: int, weight: float) -> list[float]:
        """Return this rank's weight in each piece that any rank has, as sequences differ in length.

        Collective, once per batch.
        """
        if self._collectives.world_size == 1:
            return [weight] * num_pieces
        rows = self._collectives.gather_vector(torch.tensor([num_pieces, weight], dtype=torch.float64))
        weights = []
        for index in range(int(rows[:, 0].max())):
            has_piece = rows[:, 0] > index
            share = weight * len(rows) / float(rows[has_piece, 1].sum())
            own = share if index < num_pieces else 0.0
            is_even = bool(has_piece.all()) and len(set(rows[:, 1].tolist())) == 1
            weights.append(own if is_even else wrap_uneven(own))
        return weights
