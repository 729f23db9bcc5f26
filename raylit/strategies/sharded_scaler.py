"""ShardedScaler: one gradient scaler for gradients of which a rank has shards, or the whole. Worker."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raylit.strategies.shards import shards


class ShardedScaler(torch.amp.GradScaler):
    """A number that is not finite in the shard of one rank makes all of them leave out the step. torch's own cannot
    have both kinds of gradients in one optimizer."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[Any, Tensor]:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        gradients = shards(parameter.grad for parameter in parameters if parameter.grad is not None)
        for dtype in {gradient.dtype for gradient in gradients}:
            alike = [gradient for gradient in gradients if gradient.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(alike, found_inf, inv_scale)
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}
