"""What ModelCheckpoint refuses, in its arguments and in the state of a checkpoint, and in what words. Driver only."""

import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from raylit.checkpoint.naming import Naming
from raylit.errors import ConfigError
from raylit.places import is_inside


def check_options(given: Any, every_n_train_steps: int, every_n_epochs: int, interval: timedelta | None) -> None:
    """ConfigError: a value, or a combination, that cannot work. `given`: the callback, with its public attributes."""
    monitor, mode, save_top_k, save_last = given.monitor, given.mode, given.save_top_k, given.save_last
    num_given = (every_n_train_steps > 0) + (every_n_epochs > 0) + (interval is not None)
    for is_wrong, message in (
        (mode not in ("min", "max"), f"mode={mode!r}: must be 'min' or 'max'"),
        (save_top_k < -1, f"save_top_k={save_top_k}: must be -1 (all), 0 (none) or a count"),
        (
            not isinstance(given.save_on_exception, bool),
            f"save_on_exception={given.save_on_exception!r}: True or False",
        ),
        (save_last not in (None, True, False, "link"), f"save_last={save_last!r}: allowed: True, 'link'"),
        (every_n_train_steps < 0, f"every_n_train_steps={every_n_train_steps}: must be at least 0"),
        (every_n_epochs < 0, f"every_n_epochs={every_n_epochs}: must be at least 0"),
        (num_given > 1, "give one of every_n_train_steps, every_n_epochs and train_time_interval"),
        (monitor is None and save_top_k > 1, f"save_top_k={save_top_k}: best by what? Give monitor"),
    ):
        if is_wrong:
            raise ConfigError(f"ModelCheckpoint: {message}")
    for filename in (None, given.CHECKPOINT_NAME_LAST):
        Naming.of(given, filename).path({})  # refused here rather than at the first save


def missing_metric(monitor: str | None, names: list[str]) -> str:
    return (
        f"ModelCheckpoint(monitor={monitor!r}): no such metric has been logged; there are: {', '.join(names)}. Log it "
        "with self.log, or monitor one of these"
    )


def moved(before: str, now: str) -> str:
    return (
        f"checkpoints go to {now}, those of the resumed run went to {before}: its best_model_path is taken over, its "
        "other files and scores are not"
    )


def without_foreign_paths(state: Mapping[str, Any], directory: Any) -> dict[str, Any]:
    """A ModelCheckpoint's state from a checkpoint, without the paths that do not lie in its own directory.

    The file may be a stranger's, and what the state calls the best or the last is read, overwritten and removed.
    """

    def is_own(path: object) -> bool:
        return isinstance(path, str) and isinstance(directory, str) and is_inside(path, directory)

    named = {key: state.get(key, "") for key in ("best_model_path", "last_model_path", "newest_model_path")}
    ranked = state.get("best_k_models", {})
    ranked = ranked if isinstance(ranked, dict) else {}
    paths = [*named.values(), *ranked]
    if foreign := list(dict.fromkeys(str(path) for path in paths if path not in ("", None) and not is_own(path))):
        warnings.warn(
            f"the checkpoint's ModelCheckpoint names files outside of its directory {directory}, which are left alone: "
            f"{', '.join(foreign[:3])}",
            stacklevel=3,
        )
    own = {key: path if is_own(path) else "" for key, path in named.items()}
    return {**state, **own, "best_k_models": {path: score for path, score in ranked.items() if is_own(path)}}
