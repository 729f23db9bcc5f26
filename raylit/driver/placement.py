"""Placement: one placement group for the workers of a run, all of them or none. Driver."""

import math
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raylit.driver import cluster
from raylit.errors import ResourcesError
from raylit.plan import Workers


class Placement:
    """The bundles of a group: one for each worker."""

    def __init__(self, workers: Workers) -> None:
        """ResourcesError: the cluster has not what is asked for, or did not offer it in time."""
        self._bundle = _bundle(workers)
        self._group: PlacementGroup = placement_group(
            [dict(self._bundle) for _ in range(workers.num_workers)], strategy="PACK"
        )
        try:
            is_placed = self._group.wait(workers.start_timeout_s)
        except BaseException:
            self.remove()
            raise
        if not is_placed:
            self.remove()
            raise ResourcesError(
                f"{workers.num_workers} workers of {_in_words(self._bundle)} each were not free within "
                f"{workers.start_timeout_s:g} s; free now: {_in_words(ray.available_resources())}. "
                "Ask for fewer workers or resources, or end what holds them"
            )

    def options(self, index: int) -> dict[str, Any]:
        """Ray's options for the actor of this bundle."""
        custom = {name: amount for name, amount in self._bundle.items() if name not in ("CPU", "GPU")}
        return {
            "num_cpus": self._bundle.get("CPU", 0),
            "num_gpus": self._bundle.get("GPU", 0),
            "resources": custom,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=index
            ),
        }

    def remove(self) -> None:
        remove_placement_group(self._group)


def _bundle(workers: Workers) -> dict[str, float]:
    """What a worker asks for. CPU processes share the cores where there are fewer of these than of them."""
    total = ray.cluster_resources()
    bundle = dict(workers.resources_per_worker)
    if not bundle:
        bundle = {"CPU": _cpu_share(total.get("CPU", 0.0), workers.num_workers)}
        if workers.accelerator == "cuda":
            bundle["GPU"] = 1.0
    for name, amount in bundle.items():
        needed = amount * workers.num_workers
        if needed > total.get(name, 0.0) + 1e-6:
            raise ResourcesError(
                f"{workers.num_workers} workers of {_in_words(bundle)} each need {needed:g} {name}; the cluster has "
                f"{total.get(name, 0.0):g}: ask for fewer workers, or connect to a larger cluster (RAY_ADDRESS)"
            )
    return bundle


def _cpu_share(num_cpus: float, num_workers: int) -> float:
    """A CPU for each worker, or less where there are fewer: more processes than cores are allowed."""
    if cluster.is_embedded():
        # The node is ours alone. A small share leaves room beside warm workers that wait for their next run.
        return 0.01
    share = num_cpus / num_workers
    return 1.0 if share >= 1 else max(0.001, math.floor(share * 1000) / 1000)


def _in_words(resources: dict[str, float]) -> str:
    """Amounts by name, without Ray's internal ones."""
    named = {name: amount for name, amount in resources.items() if ":" not in name and "memory" not in name}
    return ", ".join(f"{amount:g} {name}" for name, amount in named.items()) or "nothing"
