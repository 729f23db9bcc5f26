"""Asked: what a run was asked for, under Lightning's names, as the Trainer and hooks' view have it. Both sides."""

from raylit.plan import BatchLimit, Plan


class Asked:
    """Properties that read the plan."""

    _plan: Plan

    @property
    def max_epochs(self) -> int | None:
        return self._plan.limits.max_epochs

    @property
    def min_epochs(self) -> int:
        return self._plan.limits.min_epochs

    @property
    def max_steps(self) -> int:
        """-1: no limit."""
        return -1 if self._plan.limits.max_steps is None else self._plan.limits.max_steps

    @property
    def min_steps(self) -> int:
        return self._plan.limits.min_steps

    @property
    def limit_train_batches(self) -> BatchLimit:
        return self._plan.limits.train_batches

    @property
    def limit_val_batches(self) -> BatchLimit:
        return self._plan.limits.val_batches

    @property
    def limit_test_batches(self) -> BatchLimit:
        return self._plan.limits.test_batches

    @property
    def limit_predict_batches(self) -> BatchLimit:
        return self._plan.limits.predict_batches

    @property
    def overfit_batches(self) -> BatchLimit:
        return self._plan.limits.overfit_batches

    @property
    def num_sanity_val_steps(self) -> int:
        return self._plan.limits.sanity_val_batches

    @property
    def val_check_interval(self) -> BatchLimit:
        """1.0 where validation comes by time."""
        return self._plan.validation.interval

    @property
    def check_val_every_n_epoch(self) -> int | None:
        return self._plan.validation.every_n_epochs

    @property
    def log_every_n_steps(self) -> int:
        return self._plan.reporting.log_every_n_steps

    @property
    def gradient_clip_val(self) -> float | None:
        return self._plan.optimization.clip_val

    @property
    def gradient_clip_algorithm(self) -> str:
        return self._plan.optimization.clip_algorithm

    @property
    def precision(self) -> str:
        return self._plan.optimization.precision

    @property
    def fast_dev_run(self) -> bool:
        return self._plan.is_dev_run

    @property
    def default_root_dir(self) -> str:
        return self._plan.default_root_dir

    @property
    def num_devices(self) -> int:
        """Workers of each host."""
        return self._plan.workers.world_size // (self._plan.workers.num_nodes or 1)
