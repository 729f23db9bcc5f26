"""Tokens per second of a small GPT on one CUDA device, against the hand-written loop: bfloat16, all switched on.

    python tests/benchmarks/gpu_tokens.py

It needs a CUDA device and says so without one. `--cpu` runs a tiny model, only to see that the script works.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl

WARM_UP = 20


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.feed_norm(x))


class GPT(nn.Module):
    def __init__(self, *, vocabulary: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, num_heads=max(1, width // 64)) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def loss(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens[:, :-1]) + self.places.weight[: tokens.shape[1] - 1]
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Timer:
    """Tokens per second between two steps, the device's queue emptied at both."""

    def __init__(self, *, num_steps: int, tokens_per_step: int, is_on_gpu: bool) -> None:
        self.num_steps, self.tokens_per_step, self.is_on_gpu = num_steps, tokens_per_step, is_on_gpu
        self.started = self.tokens_per_s = 0.0

    def tick(self, index: int) -> None:
        if index not in (WARM_UP, WARM_UP + self.num_steps):
            return
        if self.is_on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if index == WARM_UP:
            self.started = now
        else:
            self.tokens_per_s = self.num_steps * self.tokens_per_step / (now - self.started)


class Module(pl.LightningModule):
    def __init__(self, shape: dict[str, int], timer: Timer) -> None:
        super().__init__()
        self.gpt, self.timer = GPT(**shape), timer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.timer.tick(batch_idx)
        loss = self.gpt.loss(batch[0])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-4)


def by_hand(shape: dict[str, int], loader: DataLoader[Any], timer: Timer, device: str) -> float:
    model = GPT(**shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for index, (tokens,) in enumerate(loader):
        timer.tick(index)
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model.loss(tokens.to(device, non_blocking=True))
        loss.backward()
        optimizer.step()
    return timer.tokens_per_s


def with_raylit(shape: dict[str, int], loader: DataLoader[Any], timer: Timer, arguments: dict[str, Any]) -> float:
    model = Module(shape, timer)
    pl.fit(model, loader, max_epochs=1, precision="bf16-mixed", **arguments)
    return float(model.timer.tokens_per_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--cpu", action="store_true", help="a tiny model on the CPU: the numbers mean nothing")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("gpu_tokens.py needs a CUDA device and torch sees none here: nothing was measured")
        return
    shape = {"vocabulary": 32_000, "length": 512, "width": 512, "depth": 8}
    if args.cpu:
        shape = {"vocabulary": 64, "length": 16, "width": 64, "depth": 1}
    num_samples = args.batch_size * (WARM_UP + args.num_steps + 1)
    tokens = torch.randint(shape["vocabulary"], (num_samples, shape["length"] + 1))
    loader = DataLoader(TensorDataset(tokens), batch_size=args.batch_size, shuffle=True, pin_memory=not args.cpu)
    per_step = args.batch_size * shape["length"]
    timer = partial(Timer, num_steps=args.num_steps, tokens_per_step=per_step, is_on_gpu=not args.cpu)
    placed: dict[str, Any] = {"accelerator": "cpu"} if args.cpu else {"gpus": 1}
    placed["default_root_dir"] = tempfile.mkdtemp()
    device = "cpu" if args.cpu else "cuda"
    ratios: dict[int, list[float]] = {0: [], 1: []}
    before = by_hand(shape, loader, timer(), device)
    for _ in range(args.rounds):
        for num_workers, values in ratios.items():
            own = with_raylit(shape, loader, timer(), {**placed, "num_workers": num_workers})
            after = by_hand(shape, loader, timer(), device)
            values.append(own / statistics.mean((before, after)))
            before = after
    print(f"by hand: {before:.0f} tokens/s, the last run")
    for num_workers, values in ratios.items():
        median = statistics.median(values)
        print(
            f"raylit, num_workers={num_workers}: {median:.3f} of its tokens/s ({min(values):.3f} - {max(values):.3f})"
        )


if __name__ == "__main__":
    main()
