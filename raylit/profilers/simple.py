"""SimpleProfiler: the table of times and peak memory. Both sides."""

import os
from collections.abc import Mapping

from raylit.profilers.base import Profiler


class SimpleProfiler(Profiler):
    """How often each action ran, how long in all and on average, and its share of the run; times exclude the actions
    inside an action, so that they add up. `extended=False`: totals and means only. For the rest see Profiler."""

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        extended: bool = True,
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self.extended = extended

    @property
    def columns(self) -> Mapping[str, bool]:
        return {"is_extended": self.extended}
