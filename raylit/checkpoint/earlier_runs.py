"""EarlierRuns: the checkpoints that runs before this one have left where this one would save. Driver."""

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from raylit.checkpoint import files
from raylit.checkpoint.index import newest_first, newest_usable, read_index, written_at
from raylit.errors import CheckpointError
from raylit.places import is_inside, joined


class EarlierRuns:
    """Directories of checkpoints, one for each run; those that do not exist count for nothing."""

    def __init__(self, directories: Sequence[str], *, root_dir: str) -> None:
        """`root_dir`: where there would be some."""
        self._directories = directories
        self._root_dir = root_dir

    def newest_usable(self, *, allow_pickle: bool = False, is_whole: bool = True) -> tuple[str, dict[str, Any]] | None:
        """Path and content of the checkpoint to continue from: the newest of the newest run. Damaged ones are named in
        a warning and passed over. Arguments: as `files.read` has them. None: there is none."""
        for directory in self._newest_first():
            if found := newest_usable(directory, allow_pickle=allow_pickle, is_whole=is_whole):
                return found
        return None

    def last(self) -> str:
        """The file written last; empty where there is none."""
        return next((path for directory in self._newest_first() for path in newest_first(directory)), "")

    def best(self, *, allow_pickle: bool = False) -> str:
        """What the newest run holds for its best; empty where it has none."""
        for directory in self._newest_first():
            if name := read_index(directory).best:
                return joined(directory, name)
            for path in newest_first(directory):
                with suppress(CheckpointError):
                    best = _best_path_in(files.read(path, allow_pickle=allow_pickle, is_whole=False))
                    return best if is_inside(best, directory) else ""
        return ""

    def described(self) -> str:
        """Where they were looked for, for messages."""
        places = list(dict.fromkeys(os.path.dirname(directory) for directory in self._directories)) or [self._root_dir]
        return f"{', '.join(places[:3])}{f' and {len(places) - 3} more directories' if len(places) > 3 else ''}"

    def _newest_first(self) -> list[str]:
        newest = {directory: next(newest_first(directory), "") for directory in self._directories}
        times = {directory: written_at(path) for directory, path in newest.items() if path}
        return sorted(times, key=lambda directory: times[directory], reverse=True)


def _best_path_in(checkpoint: dict[str, Any]) -> str:
    """By the state of its ModelCheckpoint."""
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    return next((str(state["best_model_path"]) for state in states if state.get("best_model_path")), "")
