"""Data parallelism by torch's DistributedDataParallel. Worker."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raylit.strategies.base import TrainingStep
from raylit.strategies.single import SingleStrategy


class _StepModule(nn.Module):
    """Lets DDP's forward be the user's training_step."""

    def __init__(self, module: nn.Module, training_step: TrainingStep) -> None:
        super().__init__()
        self.module = module
        self.forward = training_step


class DDPStrategy(SingleStrategy):
    """Every rank holds the whole model; gradients are averaged during the backward pass."""

    def __init__(self) -> None:
        self._ddp: DistributedDataParallel | None = None

    def wrap(self, module: nn.Module, training_step: TrainingStep) -> TrainingStep:
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return training_step
        self._ddp = DistributedDataParallel(_StepModule(module, training_step))
        return self._ddp

    def without_sync(self) -> AbstractContextManager[object]:
        return self._ddp.no_sync() if self._ddp is not None else nullcontext()

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if not trained:
            return
        present = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
        dist.all_reduce(present)
        for parameter, num_present in zip(trained, present.tolist(), strict=True):
            # A parameter without a gradient on any rank keeps None, as it would in one process.
            if num_present == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    def sync_buffers(self, module: nn.Module) -> None:
        for buffer in module.buffers():
            copy = buffer.contiguous()
            dist.broadcast(copy, src=0)
            if copy is not buffer:
                buffer.copy_(copy)
