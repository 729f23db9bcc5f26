"""Batch norm over the batches of all ranks: torch's own on GPUs, the same on the CPU, where torch has none. Worker."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylit.compat.torch_module import BatchNormBase, copy_registered


class SyncedBatchNorms:
    """The batch norms of a module, exchanged for ones that take their statistics over all ranks, until `restore`."""

    def __init__(self, module: nn.Module, *, device: torch.device) -> None:
        self._exchanged: list[tuple[nn.Module, str, nn.Module]] = []
        synced: dict[nn.Module, nn.Module] = {}
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BatchNormBase) and not isinstance(child, (nn.SyncBatchNorm, _CPUSyncBatchNorm)):
                    if child not in synced:
                        synced[child] = _synced(child, device)
                    self._exchanged.append((parent, name, child))
                    setattr(parent, name, synced[child])

    @property
    def exchanged(self) -> dict[nn.Module, nn.Module]:
        """The module's own, and what each has become."""
        return {own: getattr(parent, name) for parent, name, own in self._exchanged}

    @property
    def needs_batch_on_every_rank(self) -> bool:
        """Some are torch's own, which count the samples of a rank that follows with another's batch."""
        return any(not isinstance(synced, _CPUSyncBatchNorm) for synced in self.exchanged.values())

    def silence(self, *, is_silent: bool) -> None:
        """This rank's batches count for nothing; on the CPU only, torch's own count every batch that is not empty."""
        for parent, name, _ in self._exchanged:
            norm = getattr(parent, name)
            if isinstance(norm, _CPUSyncBatchNorm):
                norm.is_silent = is_silent

    def restore(self) -> None:
        """Put the module's own back, with what the others have counted."""
        for parent, name, own in self._exchanged:
            exchanged = getattr(parent, name)
            copy_registered(exchanged, own)
            own.training = exchanged.training
            setattr(parent, name, own)
        self._exchanged = []


class _CPUSyncBatchNorm(BatchNormBase):
    """torch.nn.SyncBatchNorm in differentiable collectives. Its forward is collective in train mode.

    Statistics as in Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, over batch and all further dimensions.
    """

    is_silent = False

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1, *([1] * (input.ndim - 2))]
        given, input = input.dtype, input.to(torch.promote_types(input.dtype, torch.float32))
        count = torch.tensor([input.numel() / input.shape[1]], dtype=input.dtype)
        share = 0.0 if self.is_silent else 1.0
        sums: Any = _SumOverRanks.apply(torch.cat([input.sum(dims), count]) * share)
        num_all = sums[-1].detach()
        if num_all <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        mean = sums[:-1] / num_all
        centered = input - mean.view(shape)
        variance: Tensor = _SumOverRanks.apply((centered * centered).sum(dims) * share) / num_all
        self._count(mean.detach(), variance.detach(), num_all)
        normal = centered * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(given)

    @torch.no_grad()
    def _count(self, mean: Tensor, variance: Tensor, num_all: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if factor is None else factor
        assert factor is not None
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance * num_all / (num_all - 1), factor)


class _SumOverRanks(torch.autograd.Function):
    """Add a tensor up over all ranks; its gradient is the sum of the gradients that all ranks have. Collective.

    `torch.distributed.nn.functional.all_reduce` does the same and is deprecated in favour of private functions.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def _synced(norm: Any, device: torch.device) -> nn.Module:
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    if not dist.is_initialized():
        return norm
    synced = _CPUSyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    copy_registered(norm, synced)
    synced.training = norm.training
    return synced
