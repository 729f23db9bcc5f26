"""Batch normalization over the batches of all ranks. Worker.

On GPUs it is torch's SyncBatchNorm; on the CPU, where torch has none, an implementation of the same.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylit.compat.torch_core import BatchNormBase, copy_registered


class SyncedBatchNorms:
    """Batch norms of a module, replaced by ones that compute their statistics over all ranks, until `restore`."""

    def __init__(self, module: nn.Module, *, device: torch.device) -> None:
        self._originals: list[tuple[nn.Module, str, nn.Module]] = []
        synced: dict[nn.Module, nn.Module] = {}
        for parent in list(module.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, BatchNormBase) and not isinstance(child, (nn.SyncBatchNorm, _CPUSyncBatchNorm)):
                    if child not in synced:
                        synced[child] = _build_synced_norm(child, device)
                    self._originals.append((parent, name, child))
                    setattr(parent, name, synced[child])

    @property
    def replacements(self) -> dict[nn.Module, nn.Module]:
        """Return the replacement of each of the module's own batch norms."""
        return {own: getattr(parent, name) for parent, name, own in self._originals}

    @property
    def needs_batch_on_every_rank(self) -> bool:
        """Return whether some are torch's own, which count the samples of a rank that runs on another rank's batch."""
        return any(not isinstance(synced, _CPUSyncBatchNorm) for synced in self.replacements.values())

    def exclude_rank(self, *, is_excluded: bool) -> None:
        """Leave this rank's batches out of the statistics, or include them again.

        It works on the CPU only: torch's own SyncBatchNorm counts every batch that is not empty.
        """
        for parent, name, _ in self._originals:
            norm = getattr(parent, name)
            if isinstance(norm, _CPUSyncBatchNorm):
                norm.is_excluded = is_excluded

    def restore(self) -> None:
        """Put the module's own batch norms back, with the running statistics of their replacements."""
        for parent, name, own in self._originals:
            replacement = getattr(parent, name)
            copy_registered(replacement, own)
            own.training = replacement.training
            setattr(parent, name, own)
        self._originals = []


class _CPUSyncBatchNorm(BatchNormBase):
    """The equivalent of torch.nn.SyncBatchNorm in differentiable collectives. Its forward is collective in train mode.

    Statistics are computed as in Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, over batch and all further
    dimensions.
    """

    is_excluded = False

    def _check_input_dim(self, input: Tensor) -> None: ...

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        dims = [0, *range(2, input.ndim)]
        shape = [1, -1, *([1] * (input.ndim - 2))]
        input_dtype, input = input.dtype, input.to(torch.promote_types(input.dtype, torch.float32))
        count = torch.tensor([input.numel() / input.shape[1]], dtype=input.dtype)
        share = 0.0 if self.is_excluded else 1.0
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
        return normal.to(input_dtype)

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
    """Sum of a tensor over all ranks; its gradient is the sum of the gradients of all ranks. Collective.

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


def _build_synced_norm(norm: Any, device: torch.device) -> nn.Module:
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(norm)
    if not dist.is_initialized():
        return norm
    synced = _CPUSyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    copy_registered(norm, synced)
    synced.training = norm.training
    return synced
