"""How long a run is, how much of each loader it takes and when it validates. Driver."""

from datetime import timedelta

from raylit.arguments.checks import check_count, check_share
from raylit.callbacks.timer import Duration, seconds_of
from raylit.errors import ConfigError
from raylit.plan import BatchLimit, Limits, Validation


def parse_limits(
    *,
    max_epochs: int | None,
    min_epochs: int | None,
    max_steps: int,
    min_steps: int | None,
    max_time: Duration | None,
    limit_train_batches: BatchLimit,
    limit_val_batches: BatchLimit,
    limit_test_batches: BatchLimit,
    limit_predict_batches: BatchLimit,
    overfit_batches: BatchLimit,
    num_sanity_val_steps: int,
    fast_dev_run: bool | int,
) -> Limits:
    """Lightning's -1 and None for "no limit" become None. Without any limit there are 1000 epochs."""
    check_count(0, min_epochs=min_epochs or 0, min_steps=min_steps or 0)
    check_count(-1, max_epochs=0 if max_epochs is None else max_epochs, max_steps=max_steps)
    check_count(-1, num_sanity_val_steps=num_sanity_val_steps)
    check_count(0, fast_dev_run=int(fast_dev_run) if isinstance(fast_dev_run, bool) else fast_dev_run)
    check_share(
        limit_train_batches=limit_train_batches,
        limit_val_batches=limit_val_batches,
        limit_test_batches=limit_test_batches,
        limit_predict_batches=limit_predict_batches,
        overfit_batches=overfit_batches,
    )
    max_time_s = None if max_time is None else seconds_of(max_time, name="max_time")
    if fast_dev_run:
        return _dev_run(int(fast_dev_run))
    if max_epochs is None:
        max_epochs = 1000 if max_steps == -1 and max_time_s is None else -1
    return Limits(
        max_epochs=None if max_epochs == -1 else max_epochs,
        min_epochs=min_epochs or 0,
        max_steps=None if max_steps == -1 else max_steps,
        min_steps=min_steps or 0,
        max_time_s=max_time_s,
        train_batches=limit_train_batches,
        val_batches=limit_val_batches,
        test_batches=limit_test_batches,
        predict_batches=limit_predict_batches,
        overfit_batches=overfit_batches,
        sanity_val_batches=num_sanity_val_steps,
    )


def parse_validation(
    *, val_check_interval: BatchLimit | Duration, check_val_every_n_epoch: int | None, fast_dev_run: bool | int
) -> Validation:
    """The interval: a fraction of the epoch above 0, a positive count of batches, or a time."""
    if check_val_every_n_epoch is not None:
        check_count(1, check_val_every_n_epoch=check_val_every_n_epoch)
    if isinstance(val_check_interval, (str, dict, timedelta)):
        interval_s = seconds_of(val_check_interval, name="val_check_interval")
        if interval_s == 0:
            raise ConfigError(f"val_check_interval={val_check_interval!r}: no time at all; 1 is after every batch")
        validation = Validation(interval_s=interval_s, every_n_epochs=check_val_every_n_epoch)
        return Validation() if fast_dev_run else validation
    is_fraction = isinstance(val_check_interval, float)
    if not is_fraction and (isinstance(val_check_interval, bool) or not isinstance(val_check_interval, int)):
        raise ConfigError(
            f"val_check_interval={val_check_interval!r}: must be a float in (0, 1], an int, or a time "
            '("DD:HH:MM:SS", a timedelta or a dict of its keywords)'
        )
    if (is_fraction and not 0 < val_check_interval <= 1) or (not is_fraction and val_check_interval < 1):
        raise ConfigError(
            f"val_check_interval={val_check_interval!r}: must be a float in (0, 1] or an int of at least 1; "
            "limit_val_batches=0 turns validation off"
        )
    if fast_dev_run:
        return Validation()
    if check_val_every_n_epoch is None and is_fraction:
        raise ConfigError(
            f"val_check_interval={val_check_interval!r} with check_val_every_n_epoch=None, which counts batches across "
            "epochs: give the interval as an int, or as a time"
        )
    return Validation(interval=val_check_interval, every_n_epochs=check_val_every_n_epoch)


def _dev_run(num_batches: int) -> Limits:
    return Limits(
        max_epochs=1,
        train_batches=num_batches,
        val_batches=num_batches,
        test_batches=num_batches,
        predict_batches=num_batches,
        sanity_val_batches=0,
    )
