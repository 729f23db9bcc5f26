"""MLFlowLogger: metrics, hyper-parameters and checkpoints for MLflow, through its own package. Driver only."""

import os
import re
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, Literal

from raylit.core.hparams import flatten
from raylit.loggers.base import Logger, SavedFiles, plain, uploads_each_save

_LONGEST_VALUE = 6000
"""Maximum length of a parameter's value in MLflow, in characters."""
_MOST_PARAMS = 100
"""Maximum number of parameters in one batch."""
_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_/. -]+")
_STATUS = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MLFlowLogger(Logger):
    """Logger that writes to an MLflow run, which is created when it is first needed.

    Without a `tracking_uri` the store is `save_dir`, which contains a database and the artifacts (with MLflow 2, or if
    it already contains a file store, files).

    Args:
        experiment_name: Name of the experiment, which is created if needed.
        run_name: Name of the run; None: MLflow chooses one.
        tracking_uri: Server or store; None: MLFLOW_TRACKING_URI, else `save_dir`.
        tags: Tags of the run.
        save_dir: Directory of a local store.
        log_model: Upload checkpoints as artifacts: True those that exist at the end, "all" each one when it is saved.
        checkpoint_path_prefix: Put before the artifacts' path.
        prefix: Put before every metric's name, with a hyphen.
        artifact_location: Location of the artifacts of a new experiment.
        run_id: Continue this run.
        synchronous: Passed to MLflow's `log_batch`; None: MLflow's default.

    Raises:
        ModuleNotFoundError: if mlflow is not installed.
    """

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, Any] | None = None,
        save_dir: str | os.PathLike[str] | None = "./mlruns",
        log_model: Literal["all"] | bool = False,
        checkpoint_path_prefix: str = "",
        prefix: str = "",
        artifact_location: str | None = None,
        run_id: str | None = None,
        synchronous: bool | None = None,
    ) -> None:
        _import_mlflow()
        self._directory = os.path.abspath(os.path.expanduser(os.fspath(save_dir or "./mlruns")))
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._tags = dict(tags or {})
        self._log_model = log_model
        self._checkpoint_path_prefix = checkpoint_path_prefix
        self._prefix = prefix
        self._artifact_location = artifact_location
        self._run_id = run_id
        self._experiment_id: str | None = None
        self._synchronous = synchronous
        self._client: Any = None
        self._saved = SavedFiles()
        self._checkpoint_callback: Any = None

    @property
    def name(self) -> str | None:
        """The experiment's id."""
        return self.experiment_id

    @property
    def version(self) -> str | None:
        """The run's id."""
        return self.run_id

    @property
    def experiment_id(self) -> str | None:
        _ = self.experiment
        return self._experiment_id

    @property
    def run_id(self) -> str | None:
        _ = self.experiment
        return self._run_id

    @property
    def save_dir(self) -> str | None:
        """Directory of a store on this host; None for a server."""
        if self._tracking_uri is None:
            return self._directory
        return self._tracking_uri.removeprefix("file:") if self._tracking_uri.startswith("file:") else None

    @property
    def root_dir(self) -> str | None:
        return None if self.save_dir is None else os.path.join(self.save_dir, self.experiment_id or "")

    @property
    def log_dir(self) -> str | None:
        """The run's directory in a store on this host."""
        return None if self.root_dir is None else os.path.join(self.root_dir, self.run_id or "")

    @property
    def experiment(self) -> Any:
        """The `MlflowClient`; its methods take the `run_id`."""
        if self._client is None:
            client = _import_mlflow().tracking.MlflowClient(self._tracking_uri or _choose_local_store(self._directory))
            if self._run_id is not None:
                self._experiment_id = client.get_run(self._run_id).info.experiment_id
            else:
                existing = client.get_experiment_by_name(self._experiment_name)
                self._experiment_id = (
                    existing.experiment_id
                    if existing is not None and existing.lifecycle_stage != "deleted"
                    else client.create_experiment(self._experiment_name, artifact_location=self._artifacts)
                )
                run = client.create_run(self._experiment_id, tags=self._tags, run_name=self._run_name)
                self._run_id = run.info.run_id
            self._client = client
        return self._client

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now_ms = int(time.time() * 1000)
        start = f"{self._prefix}-" if self._prefix else ""
        entries = [
            _import_mlflow().entities.Metric(
                key=_NOT_IN_NAMES.sub("", start + name), value=float(value), timestamp=now_ms, step=step or 0
            )
            for name, value in metrics.items()
        ]
        self.experiment.log_batch(self.run_id, metrics=entries, **self._how)

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        values = dict(flatten(plain(vars(params) if isinstance(params, Namespace) else params)))
        entries = [
            _import_mlflow().entities.Param(key=_NOT_IN_NAMES.sub("", name), value=str(value)[:_LONGEST_VALUE])
            for name, value in values.items()
        ]
        for first in range(0, len(entries), _MOST_PARAMS):
            self.experiment.log_batch(self.run_id, params=entries[first : first + _MOST_PARAMS], **self._how)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        if uploads_each_save(self._log_model, checkpoint_callback):
            self._log_checkpoints(checkpoint_callback)
        elif self._log_model:
            self._checkpoint_callback = checkpoint_callback

    def finalize(self, status: str) -> None:
        if self._client is None:
            return
        if status == "success" and self._checkpoint_callback is not None:
            self._log_checkpoints(self._checkpoint_callback)
        self.experiment.set_terminated(self.run_id, _STATUS.get(status, status))

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process continues the same run.
        return {**self.__dict__, "_run_id": self.run_id, "_client": None, "_checkpoint_callback": None}

    @property
    def _artifacts(self) -> str | None:
        is_local = self._tracking_uri is None and self._artifact_location is None
        return f"file:{self._directory}" if is_local else self._artifact_location

    @property
    def _how(self) -> dict[str, Any]:
        return {} if self._synchronous is None else {"synchronous": self._synchronous}

    def _log_checkpoints(self, callback: Any) -> None:
        for saved in self._saved.new(callback):
            folder = PurePosixPath(self._checkpoint_path_prefix, "model", "checkpoints")
            stem = os.path.splitext(os.path.basename(saved.path))[0]
            self.experiment.log_artifact(self.run_id, saved.path, str(folder / stem))


def _choose_local_store(directory: str) -> str:
    has_files = os.path.isdir(os.path.join(directory, ".trash"))  # a file store creates this directory first
    if has_files or int(_import_mlflow().__version__.partition(".")[0]) < 3:
        return f"file:{directory}"
    os.makedirs(directory, exist_ok=True)
    return f"sqlite:///{directory}/mlflow.db"  # MLflow 3 refuses file stores


def _import_mlflow() -> Any:
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("MLFlowLogger needs the package mlflow: pip install 'raylit[mlflow]'") from error
    return mlflow
