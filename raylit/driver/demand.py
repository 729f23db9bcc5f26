"""Demand: what the workers of a run need, and whether given hosts can ever offer it. Driver; knows nothing of Ray."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from raylit.plan import Workers

Resources = dict[str, float]
"""Amounts by Ray's names."""

_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What a host has: all of it, or what is free, as the question demands."""

    resources: Resources
    labels: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """`workers` of the same `each`."""

    workers: Workers
    each: Resources

    @property
    def bundles(self) -> list[Resources]:
        """One for each worker; one for each host where a host has to take a number of them."""
        num_bundles = self.workers.num_nodes or self.workers.num_workers
        share = self.workers.num_workers // num_bundles
        # Ray counts in steps of 1/10000: 3 * 0.1 must not become a hair more than 0.3.
        return [{name: round(amount * share, 4) for name, amount in self.each.items()} for _ in range(num_bundles)]

    @property
    def bundle_of_worker(self) -> list[int]:
        share = self.workers.num_workers // len(self.bundles)
        return [index // share for index in range(self.workers.num_workers)]

    @property
    def strategy(self) -> str:
        return "STRICT_SPREAD" if self.workers.num_nodes else self.workers.placement

    def fits(self, hosts: Sequence[Host]) -> bool:
        slots = [num_slots(host.resources, self.each) for host in hosts if self.is_allowed_on(host)]
        wanted = self.workers.num_workers
        if self.workers.num_nodes:
            share = wanted // self.workers.num_nodes
            return sum(count >= share for count in slots) >= self.workers.num_nodes
        if self.workers.placement == "STRICT_PACK":
            return max(slots, default=0) >= wanted
        if self.workers.placement == "STRICT_SPREAD":
            return sum(count > 0 for count in slots) >= wanted
        return sum(slots) >= wanted

    def is_allowed_on(self, host: Host) -> bool:
        """Its labels are what label_selector asks for."""
        return all(_is_selected(host.labels.get(key), value) for key, value in self.workers.label_selector.items())

    def __str__(self) -> str:
        wanted, num_nodes = self.workers.num_workers, self.workers.num_nodes
        text = f"{_counted(wanted, 'worker')} of {in_words(self.each)} each"
        if num_nodes:
            text = (
                f"{_counted(wanted // num_nodes, 'worker')} of {in_words(self.each)} each on each of {num_nodes} hosts"
            )
        elif self.workers.placement == "STRICT_PACK":
            text += " on one host"
        elif self.workers.placement == "STRICT_SPREAD":
            text += f" on {wanted} different hosts"
        if self.workers.label_selector:
            text += f" with the labels {self.workers.label_selector}"
        return text


def num_slots(resources: Resources, each: Resources) -> int:
    """How many times `each` fits into `resources`."""
    return min(math.floor((resources.get(name, 0.0) + _TOLERANCE) / amount) for name, amount in each.items())


def in_words(resources: Resources) -> str:
    """Amounts by name, CPU and GPU first, without Ray's internal ones, such as those of placement groups. Ray itself
    lists them in no order."""
    named = {name: amount for name, amount in resources.items() if not re.search(":|memory|_group_", name)}
    ordered = sorted(named, key=lambda name: (name != "CPU", name != "GPU", name))
    return ", ".join(f"{round(named[name], 4):g} {name}" for name in ordered if named[name] > 0) or "nothing"


def _is_selected(label: str | None, condition: str) -> bool:
    """Ray's conditions: `a`, `!a`, `in(a, b)`, `!in(a, b)`. A host without the label passes the negative ones."""
    wanted = condition.removeprefix("!")
    allowed = [wanted]
    if wanted.startswith("in(") and wanted.endswith(")"):
        allowed = [value.strip() for value in wanted[3:-1].split(",")]
    return (label in allowed) != condition.startswith("!")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
