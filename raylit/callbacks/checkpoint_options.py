"""What ModelCheckpoint refuses, and in what words. Driver only."""

from datetime import timedelta
from typing import Any

from raylit.errors import ConfigError


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
