"""Publication: what follows once a checkpoint's file is there. Driver."""

from collections.abc import Sequence
from dataclasses import dataclass

from raylit.checkpoint import files
from raylit.checkpoint.index import Entry, read_index, write_index
from raylit.errors import CheckpointError
from raylit.places import is_inside, relative
from raylit.state import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """The file's second name, its entry in the index, and the end of those that have lost their place.

    In this order, so that a crash in between leaves a file too many, never one too few.
    """

    path: str
    directory: str
    """Of the index."""
    progress: Progress
    score: float | None = None
    """Where the file is kept for it."""
    is_weights_only: bool = False
    last: str = ""
    """The file's other path, which is always that of the newest; empty: it has none."""
    is_last_linked: bool = False
    """`last` is a symbolic link where that can be, else a file of its own."""
    best: str = ""
    """Path of the best file from now on."""
    outdated: Sequence[str] = ()
    """Paths that are to be removed."""

    def carry_out(self) -> None:
        """May be done again. CheckpointError: not all of it was possible."""
        added = [self._entry(self.path, score=self.score)]
        if self.last not in ("", self.path):
            is_link = self.is_last_linked and files.link(self.path, self.last)
            if not is_link:
                files.duplicate(self.path, self.last)
                added.insert(0, self._entry(self.last))
        try:
            before = read_index(self.directory)
            names = [relative(path, self.directory) for path in self.outdated]
            last, best = relative(self.last or self.path, self.directory), relative(self.best, self.directory)
            write_index(before.changed(added=added, removed=names, last=last, best=best), self.directory)
        except Exception as error:  # of whatever kind a store's own library raises
            raise CheckpointError(f"cannot write the index of {self.directory}: {error}") from error
        for path in self.outdated:
            if is_inside(path, self.directory):  # a link may have been put there since
                files.remove(path)

    def _entry(self, path: str, *, score: float | None = None) -> Entry:
        return Entry(
            name=relative(path, self.directory),
            epoch=self.progress.epoch,
            step=self.progress.global_step,
            score=score,
            is_weights_only=self.is_weights_only,
        )
