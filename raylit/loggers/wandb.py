"""WandbLogger: metrics, media and checkpoints as a run of Weights & Biases. Driver."""

import os
import secrets
import string
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from raylit.errors import ConfigError
from raylit.loggers.base import Logger, SavedFile, SavedFiles, plain, uploads_each_save
from raylit.storage import check_stays_below

_STEP = "trainer/global_step"
"""Name of the x axis."""


class WandbLogger(Logger):
    """Logger that writes to a wandb run, which is started when it is first needed.

    A run that the script has started with `wandb.init` is used.

    Args:
        name: Name of the run.
        save_dir: Root directory; None: `dir`, else the Trainer's.
        version: Id of the run; `version` and `id` are the same.
        offline: Do not upload.
        dir: Same as `save_dir`.
        id: Same as `version`; None: WANDB_RUN_ID, else a new id.
        anonymous: Allow runs without an account.
        project: Name of the project; None: WANDB_PROJECT, else "lightning_logs".
        log_model: Upload checkpoints as artifacts: True those that exist at the end, "all" each one when it is saved.
        experiment: A `wandb.Run` to use.
        prefix: Put before every metric's name, with a hyphen.
        checkpoint_name: Name of the artifacts; None: `model-ID`.
        add_file_policy: Passed to wandb's `Artifact.add_file`.
        **wandb_init: Passed to `wandb.init`.

    Raises:
        ConfigError: if `log_model` is combined with `offline`, or a name leads out of `save_dir`.
        ModuleNotFoundError: if wandb is not installed.
    """

    def __init__(
        self,
        name: str | None = None,
        save_dir: str | os.PathLike[str] | None = None,
        version: str | None = None,
        offline: bool = False,
        dir: str | os.PathLike[str] | None = None,
        id: str | None = None,
        anonymous: bool | None = None,
        project: str | None = None,
        log_model: Literal["all"] | bool = False,
        experiment: Any = None,
        prefix: str = "",
        checkpoint_name: str | None = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **wandb_init: Any,
    ) -> None:
        if offline and log_model:
            raise ConfigError("WandbLogger(offline=True, log_model=...): what is offline uploads no checkpoints")
        _import_wandb()
        directory = save_dir if save_dir is not None else dir
        self._save_dir = None if directory is None else os.path.expanduser(os.fspath(directory))
        self._project = project or os.environ.get("WANDB_PROJECT", "lightning_logs")
        run_id = next((str(value) for value in (version, id) if value not in (None, "")), None)
        self._id = os.environ.get("WANDB_RUN_ID") if run_id is None else run_id
        for option, part in (("project", self._project), ("version", self._id or "")):
            check_stays_below(part, f"WandbLogger({option}={part!r})")
        self._init = {"name": name, "resume": "allow", **wandb_init}
        if anonymous:
            self._init["anonymous"] = "allow"
        if offline:
            self._init["mode"] = "offline"
        self._log_model = log_model
        self._experiment = experiment
        self._prefix = prefix
        self._checkpoint_name = checkpoint_name
        self._add_file_policy = add_file_policy
        self._saved = SavedFiles()
        self._checkpoint_callback: Any = None

    @property
    def name(self) -> str:
        """The project's name."""
        return self._project

    @property
    def version(self) -> str:
        """The run's id."""
        if self._experiment is None and (running := _import_wandb().run) is not None:
            self._experiment = running
        if self._experiment is not None:
            return str(self._experiment.id)
        if self._id is None:
            self._id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
        return self._id

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def root_dir(self) -> str:
        return os.path.join(self._save_dir or ".", self._project)

    @property
    def log_dir(self) -> str:
        """Directory of checkpoints; wandb's own files are in `save_dir/wandb`."""
        return os.path.join(self.root_dir, self.version)

    @property
    def experiment(self) -> Any:
        """The `wandb.Run`."""
        version = self.version
        if self._experiment is None:
            directory = self._save_dir or "."
            os.makedirs(directory, exist_ok=True)
            self._experiment = _import_wandb().init(project=self._project, id=version, dir=directory, **self._init)
            self._experiment.define_metric(_STEP)
            self._experiment.define_metric("*", step_metric=_STEP, step_sync=True)
        return self._experiment

    def bind(self, default_root_dir: str) -> None:
        if self._save_dir is None:
            self._save_dir = default_root_dir

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        start = f"{self._prefix}-" if self._prefix else ""
        values = {start + name: value for name, value in metrics.items()}
        self.experiment.log(values if step is None else {**values, _STEP: step})

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        values = vars(params) if isinstance(params, Namespace) else params
        self.experiment.config.update(plain(values), allow_val_change=True)

    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Log a table, given by columns and rows, or as a dataframe."""
        table = _import_wandb().Table(columns=columns, data=data, dataframe=dataframe)
        self.log_metrics({key: table}, step)

    def log_text(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[str]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Log texts as a table, given by columns and rows, or as a dataframe."""
        self.log_table(key, columns, data, dataframe, step)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
        """Log images: tensors, arrays, PIL images or paths; each keyword, such as `caption`, has a value per image."""
        self._log_media(_import_wandb().Image, key, images, step, kwargs)

    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
        """Log audio clips; each keyword is a list with a value per clip."""
        self._log_media(_import_wandb().Audio, key, audios, step, kwargs)

    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
        """Log videos; each keyword is a list with a value per video."""
        self._log_media(_import_wandb().Video, key, videos, step, kwargs)

    def watch(
        self,
        model: nn.Module,
        log: Literal["gradients", "parameters", "all"] | None = "gradients",
        log_freq: int = 100,
        log_graph: bool = True,
    ) -> None:
        """Log histograms of a model that is trained in this process, with `num_workers=0`.

        On workers, log them in a hook: `self.logger.experiment.log({"w": wandb.Histogram(...)})`.
        """
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Any:
        """Declare an artifact as the run's input and return it."""
        return self.experiment.use_artifact(artifact, type=artifact_type)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        if uploads_each_save(self._log_model, checkpoint_callback):
            self._log_checkpoints(checkpoint_callback)
        elif self._log_model:
            self._checkpoint_callback = checkpoint_callback

    def finalize(self, status: str) -> None:
        """Upload the last checkpoints. The run stays open until the program ends or calls `wandb.finish()`."""
        if status == "success" and self._checkpoint_callback is not None:
            self._log_checkpoints(self._checkpoint_callback)

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process continues the same run.
        return {**self.__dict__, "_id": self.version, "_experiment": None, "_checkpoint_callback": None}

    def _log_media(
        self, kind: Any, key: str, items: Sequence[Any], step: int | None, kwargs: Mapping[str, Sequence[Any]]
    ) -> None:
        if not isinstance(items, list):
            raise TypeError(f"{key}: expected a list of media, got {type(items).__name__}")
        for name, values in kwargs.items():
            if len(values) != len(items):
                raise ValueError(f"{key}: {len(items)} media, but {name} has {len(values)} values")
        each = [{name: values[i] for name, values in kwargs.items()} for i in range(len(items))]
        self.log_metrics({key: [kind(item, **own) for item, own in zip(items, each, strict=True)]}, step)

    def _log_checkpoints(self, callback: Any) -> None:
        for saved in self._saved.new(callback):
            self._log_checkpoint(saved)

    def _log_checkpoint(self, saved: SavedFile) -> None:
        name = self._checkpoint_name or f"model-{self.version}"
        metadata = {"score": saved.score, "original_filename": os.path.basename(saved.path)}
        artifact = _import_wandb().Artifact(name=name, type="model", metadata=metadata)
        artifact.add_file(saved.path, name="model.ckpt", policy=self._add_file_policy)
        self.experiment.log_artifact(artifact, aliases=["latest", "best"] if saved.is_best else ["latest"])


def _import_wandb() -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("WandbLogger needs the package wandb: pip install 'raylit[wandb]'") from error
    return wandb
