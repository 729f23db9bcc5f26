"""Resource request of a run, the test whether hosts can meet it, and the wait for capacity. Driver."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from raylit.compat.ray_core import select_plain_resources
from raylit.config import Workers

_FIRST_LINE_S = 2.0
_BETWEEN_LINES_S = 10.0
_SLICE_S = 0.5


class CapacityWait:
    """Wait for capacity of the cluster, with a timeout and lines that say what is missing."""

    def __init__(self, *, timeout_s: float, first_line_s: float = _FIRST_LINE_S) -> None:
        self._timeout_s = timeout_s
        self._started_s = time.monotonic()
        self._started_at = time.strftime("%H:%M:%S")
        self._next_line_s = first_line_s

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._started_s

    @property
    def slice_s(self) -> float:
        """Time to wait before the next check."""
        return max(0.01, min(_SLICE_S, self._timeout_s - self.waited_s))

    @property
    def is_over(self) -> bool:
        return self.waited_s >= self._timeout_s

    @property
    def is_line_due(self) -> bool:
        return self.waited_s >= self._next_line_s

    def say(self, missing: str) -> None:
        """Print a whole line on stderr, above a progress bar."""
        self._next_line_s = self.waited_s + _BETWEEN_LINES_S
        text = f"raylit: waiting since {self._started_at} ({self.waited_s:.0f} s) for {missing}\n"
        sys.stderr.write(text)
        sys.stderr.flush()


Resources = dict[str, float]
"""Amounts by Ray's resource names."""

_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Resources of a host, total or free, and its labels."""

    resources: Resources
    labels: dict[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceRequest:
    """Request for `workers`, with the resources `each` for every one of them."""

    workers: Workers
    each: Resources

    @property
    def bundles(self) -> list[Resources]:
        """Bundles, one per worker, or one per host if every host takes a fixed number of workers."""
        num_bundles = self.workers.num_nodes or self.workers.num_workers
        share = self.workers.num_workers // num_bundles
        # Ray counts in steps of 1/10000: 3 * 0.1 must not become more than 0.3.
        return [{name: round(amount * share, 4) for name, amount in self.each.items()} for _ in range(num_bundles)]

    @property
    def bundle_of_worker(self) -> list[int]:
        share = self.workers.num_workers // len(self.bundles)
        return [index // share for index in range(self.workers.num_workers)]

    @property
    def strategy(self) -> str:
        return "STRICT_SPREAD" if self.workers.num_nodes else self.workers.placement

    def fits(self, hosts: Sequence[Host]) -> bool:
        return self.num_fitting(hosts) >= self.workers.num_workers

    def num_fitting(self, hosts: Sequence[Host]) -> int:
        """Return how many such workers the hosts can have at most under this placement."""
        slots = sorted(
            (num_slots(host.resources, self.each) for host in hosts if self.is_allowed_on(host)), reverse=True
        )
        num_nodes = self.workers.num_nodes
        if num_nodes:
            return slots[num_nodes - 1] * num_nodes if len(slots) >= num_nodes else 0
        if self.workers.placement == "STRICT_PACK":
            return max(slots, default=0)
        if self.workers.placement == "STRICT_SPREAD":
            return sum(count > 0 for count in slots)
        return sum(slots)

    def is_allowed_on(self, host: Host) -> bool:
        """Return True if the host's labels match label_selector."""
        return all(_meets_condition(host.labels.get(key), value) for key, value in self.workers.label_selector.items())

    def __str__(self) -> str:
        num_workers, num_nodes = self.workers.num_workers, self.workers.num_nodes
        each = format_resources(self.each, is_with_memory=True)
        text = f"{_format_count(num_workers, 'worker')} of {each} each"
        if num_nodes:
            text = f"{_format_count(num_workers // num_nodes, 'worker')} of {each} each on each of {num_nodes} hosts"
        elif self.workers.placement == "STRICT_PACK":
            text += " on one host"
        elif self.workers.placement == "STRICT_SPREAD":
            text += f" on {num_workers} different hosts"
        if self.workers.label_selector:
            text += f" with the labels {self.workers.label_selector}"
        return text


def num_slots(resources: Resources, each: Resources) -> int:
    """Return how many times `each` fits into `resources`."""
    return min(math.floor((resources.get(name, 0.0) + _TOLERANCE) / amount) for name, amount in each.items())


def format_resources(resources: Resources, *, is_with_memory: bool = False) -> str:
    """Format amounts by name, CPU and GPU first, without Ray's internal ones.

    Internal ones are those of placement groups and the like. Ray itself lists resources in no fixed order.
    """
    named = select_plain_resources(resources)
    ordered = sorted(named, key=lambda name: (name != "CPU", name != "GPU", name))
    words = [f"{round(named[name], 4):g} {name}" for name in ordered if named[name] > 0]
    if is_with_memory and resources.get("memory", 0.0) > 1:
        words.append(f"{format_gigabytes(resources['memory'])} of memory")
    return ", ".join(words) or "nothing"


def format_gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"


def _meets_condition(label: str | None, condition: str) -> bool:
    """Evaluate one of Ray's label conditions: `a`, `!a`, `in(a, b)` or `!in(a, b)`.

    A host without the label meets the negative ones.
    """
    wanted = condition.removeprefix("!")
    allowed = [wanted]
    if wanted.startswith("in(") and wanted.endswith(")"):
        allowed = [value.strip() for value in wanted[3:-1].split(",")]
    return (label in allowed) != condition.startswith("!")


def _format_count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
