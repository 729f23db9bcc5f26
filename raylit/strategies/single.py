"""Strategy of a run with one worker, where nothing is shared. Worker."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raylit.compat.torch_core import compute_norms
from raylit.strategies.base import PendingGradients, SyncCheck, TrainingStep
from raylit.strategies.sharded_state import Reader, read_in_place, read_into_new_tensors


class Single:
    """Strategy of a run with one worker: no operation is collective."""

    is_forward_collective = False
    is_evaluation_collective = False
    is_sharding = False
    is_gathering = False
    is_finding_unused = False

    def build_context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def place(
        self,
        module: nn.Module,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        steps: Sequence[str],
        is_manual: bool,
    ) -> None:
        module.to(device=device, dtype=dtype)

    def set_up(self, module: nn.Module, *, device: torch.device) -> None: ...

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None: ...

    def tear_down(self) -> None: ...

    def restore_module(self, module: nn.Module) -> None:
        module.to("cpu")

    @property
    def needs_batch_on_every_rank(self) -> bool:
        return False

    def exclude_rank(self, *, is_excluded: bool) -> None: ...

    def wrap(self, module: nn.Module, training_step: TrainingStep, *, trained: Sequence[nn.Parameter]) -> TrainingStep:
        return training_step

    def build_scaler(self, device: torch.device) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type)

    def find_unused(self) -> None: ...

    def build_sync_check(self, step: TrainingStep) -> SyncCheck | None:
        return None

    def without_sync(self, step: TrainingStep) -> AbstractContextManager[object]:
        return nullcontext()

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None: ...

    def pending_gradients(self, module: nn.Module) -> PendingGradients | None:
        return None

    def share_weights(self, module: nn.Module) -> None: ...

    def sync_buffers(self, module: nn.Module) -> None: ...

    def clip_gradients(
        self, parameters: Iterable[nn.Parameter], *, limit: float, algorithm: Literal["norm", "value"]
    ) -> None:
        if algorithm == "norm":
            nn.utils.clip_grad_norm_(parameters, limit)
        else:
            nn.utils.clip_grad_value_(parameters, limit)

    def compute_norms(self, gradients: Sequence[Tensor], order: float) -> list[Tensor]:
        return compute_norms(list(gradients), order)

    def evaluation_context(self, *, is_inference_mode: bool) -> AbstractContextManager[object]:
        return torch.inference_mode() if is_inference_mode else torch.no_grad()

    def collect_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def parts(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        return {}

    def iterate_full_weights(self, module: nn.Module) -> Iterator[dict[str, Tensor]]:
        return iter(())

    def load_weights(self, module: nn.Module, state_dict: Mapping[str, Any], *, read: Reader | None) -> None:
        own = module.state_dict()
        module.load_state_dict(state_dict if read is None else read_in_place(state_dict, own, "state_dict", read=read))

    def load_optimizer_states(
        self, optimizers: Sequence[Optimizer], states: Sequence[dict[str, Any]], *, read: Reader | None
    ) -> None:
        if read is not None:
            states = read_into_new_tensors(list(states), "optimizer_states", read=read)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
