"""Windows: the batch sizes that divide an optimizer's step, and how many batches then make one. Driver."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raylit.errors import ConfigError
from raylit.plan import Plan
from raylit.worker.context import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Per worker, for a search."""

    sizes: Sequence[int]
    """Those that are allowed, ascending."""
    world_size: int
    window: int
    """Of the Trainer; where steps have no size of their own, that stays."""
    effective: int | None = None
    """Samples of an optimizer's step, over all workers; None: as many as the size makes them."""

    @classmethod
    def of(cls, wanted: int | Literal["keep", "any"], job: Job, plan: Plan, *, size: Any, max_size: int) -> "Windows":
        """ConfigError: no size can make steps of what is wanted. `size` is what the module has now."""
        is_number = isinstance(wanted, int) and not isinstance(wanted, bool) and wanted > 0
        if wanted not in ("keep", "any") and not is_number:
            raise ConfigError(f"effective_batch_size={wanted!r}: must be a number of samples, 'keep' or 'any'")
        if wanted != "any" and not job.module.automatic_optimization:
            raise ConfigError(
                f"effective_batch_size={wanted!r} with automatic_optimization = False: the module decides when to "
                "step, so give effective_batch_size='any'"
            )
        accumulation, world_size = plan.optimization.accumulation, plan.workers.world_size
        window = accumulation[0][1]
        if wanted == "any":
            return cls(sizes=range(1, max_size + 1), world_size=world_size, window=window)
        if len(accumulation) > 1:
            raise ConfigError(
                f"effective_batch_size={wanted!r} with an accumulation that changes from epoch to epoch: give one "
                "number as accumulate_grad_batches, or effective_batch_size='any'"
            )
        if wanted == "keep" and not (isinstance(size, int) and size > 0):
            raise ConfigError(
                f"effective_batch_size='keep' of the batch size {size!r}: give the number of samples, or 'any'"
            )
        effective = window * size * world_size if wanted == "keep" else wanted
        assert isinstance(effective, int)
        share, rest = divmod(effective, world_size)
        if rest:
            raise ConfigError(
                f"effective_batch_size={effective} over {world_size} workers: must be a multiple of their number"
            )
        sizes = [size for size in range(1, min(share, max_size) + 1) if share % size == 0]
        return cls(sizes=sizes, world_size=world_size, window=window, effective=effective)

    @property
    def is_always_one(self) -> bool:
        """A step follows each batch, whatever the size."""
        return self.window == 1 if self.effective is None else len(self.sizes) == 1 and self.of_size(self.sizes[0]) == 1

    def of_size(self, size: int) -> int:
        """Batches of an optimizer's step."""
        return self.window if self.effective is None else self.effective // (size * self.world_size)
