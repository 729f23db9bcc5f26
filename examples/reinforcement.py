"""Reinforcement learning: a pole is balanced by a policy that every worker tries out for itself. Driver.

The data is an IterableDataset that plays the current policy, so each worker trains on episodes of its own.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import raylit as pl


class Pole:
    """A pole on a cart, with the physics of Barto, Sutton and Anderson 1983; pushed left (0) or right (1)."""

    MAX_STEPS = 200

    def reset(self) -> list[float]:
        self.state = torch.empty(4).uniform_(-0.05, 0.05).tolist()
        self.num_steps = 0
        return self.state

    def step(self, action: int) -> tuple[list[float], bool]:
        """The next state (position, speed, angle, angular speed) and whether the episode is over. 20 ms."""
        x, speed, angle, turning = self.state
        force = 10.0 if action == 1 else -10.0
        cos, sin = math.cos(angle), math.sin(angle)
        push = (force + 0.05 * turning**2 * sin) / 1.1
        turning_change = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos**2 / 1.1))
        speed_change = push - 0.05 * turning_change * cos / 1.1
        self.state = [
            x + 0.02 * speed,
            speed + 0.02 * speed_change,
            angle + 0.02 * turning,
            turning + 0.02 * turning_change,
        ]
        self.num_steps += 1
        is_over = abs(self.state[0]) > 2.4 or abs(self.state[2]) > math.radians(12) or self.num_steps >= self.MAX_STEPS
        return self.state, is_over


class Episodes(IterableDataset[tuple[Tensor, Tensor, Tensor]]):
    """States, actions and what each action was followed by; one item an episode."""

    def __init__(self, act: Callable[[Tensor], int], *, num_episodes: int) -> None:
        self.act = act
        self.num_episodes = num_episodes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        pole = Pole()
        for _ in range(self.num_episodes):
            states, actions = [pole.reset()], []
            is_over = False
            while not is_over:
                actions.append(self.act(torch.tensor(states[-1])))
                state, is_over = pole.step(actions[-1])
                states.append(state)
            # A reward of 1 for each step, discounted by 0.99: the sum of those that follow.
            following = [(1 - 0.99**left) / 0.01 for left in range(len(actions), 0, -1)]
            yield torch.tensor(states[:-1]), torch.tensor(actions), torch.tensor(following)


class Reinforce(pl.LightningModule):
    """Policy gradient with a mean of past returns as the baseline: Williams 1992."""

    def __init__(self, lr: float = 0.01, num_episodes: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))

    @torch.no_grad()
    def act(self, state: Tensor) -> int:
        return int(torch.distributions.Categorical(logits=self.policy(state)).sample())

    def train_dataloader(self) -> DataLoader[Any]:
        # An episode is a batch: the policy has moved on before the next one is played.
        episodes = Episodes(self.act, num_episodes=self.hparams.num_episodes)
        return DataLoader(episodes, batch_size=None)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        states, actions, following = batch
        advantage = (following - following.mean()) / (following.std() + 1e-6)
        taken = torch.distributions.Categorical(logits=self.policy(states)).log_prob(actions)
        self.log("steps", float(len(actions)), prog_bar=True, on_step=False, on_epoch=True, batch_size=1)
        return -(taken * advantage).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-workers", type=int, default=2, help="Ray actors; 0 plays in this process")
    parser.add_argument("--max-epochs", type=int, default=8)
    args = parser.parse_args()

    pl.seed_everything(2)
    model = Reinforce()
    # Every worker plays and learns from its own episodes: there is nothing to share out.
    trainer = pl.fit(model, num_workers=args.num_workers, max_epochs=args.max_epochs, use_distributed_sampler=False)
    print(f"steps balanced: {trainer.callback_metrics['steps'].item():.0f} of {Pole.MAX_STEPS}")


if __name__ == "__main__":
    main()
