"""ShardedScaler: one gradient scaler for gradients of which a rank has shards, or the whole. Worker."""

import torch.distributed as dist
from torch import Tensor

from raylit.compat.torch_optim import LocalGradScaler
from raylit.strategies.shards import shards


class ShardedScaler(LocalGradScaler):
    """A number that is not finite in the shard of one rank makes all of them leave out the step. torch's own cannot
    have both kinds of gradients in one optimizer."""

    def select_gradients(self, gradients: list[Tensor]) -> list[Tensor]:
        return shards(gradients)

    def combine_found_inf(self, found_inf: Tensor) -> None:
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
