"""WandbLogger: runs of Weights & Biases, and its media objects as workers send them."""

import os
import secrets
import string
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from raylit.errors import ConfigError
from raylit.loggers.base import Logger, SavedFile, SavedFiles, is_after_each
from raylit.loggers.file import plain
from raylit.storage import check_stays_below

_STEP = "trainer/global_step"


class WandbLogger(Logger):
    """A run of wandb's, begun when it is first needed; further keywords go to `wandb.init`.

    `version` and `id` are one thing: wandb's id of the run. `log_model`: checkpoints become artifacts, with True those
    that are left at the end, with "all" each as it is saved. A run that the script has begun with `wandb.init` is used.
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
        _package()
        directory = save_dir if save_dir is not None else dir
        self._save_dir = None if directory is None else os.path.expanduser(os.fspath(directory))
        self._project = project or os.environ.get("WANDB_PROJECT", "lightning_logs")
        given = next((str(one) for one in (version, id) if one not in (None, "")), None)
        self._id = os.environ.get("WANDB_RUN_ID") if given is None else given
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
        if self._experiment is None and (running := _package().run) is not None:
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
        """Where checkpoints go; wandb's own files are in `save_dir/wandb`."""
        return os.path.join(self.root_dir, self.version)

    @property
    def experiment(self) -> Any:
        """The `wandb.Run`."""
        version = self.version
        if self._experiment is None:
            directory = self._save_dir or "."
            os.makedirs(directory, exist_ok=True)
            self._experiment = _package().init(project=self._project, id=version, dir=directory, **self._init)
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
        table = _package().Table(columns=columns, data=data, dataframe=dataframe)
        self.log_metrics({key: table}, step)

    def log_text(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[str]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        self.log_table(key, columns, data, dataframe, step)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
        """Tensors, arrays, PIL images or paths; of each keyword, such as `caption`, a value for each image."""
        self._log_media(_package().Image, key, images, step, kwargs)

    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
        self._log_media(_package().Audio, key, audios, step, kwargs)

    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: list[Any]) -> None:
        self._log_media(_package().Video, key, videos, step, kwargs)

    def watch(
        self,
        model: nn.Module,
        log: Literal["gradients", "parameters", "all"] | None = "gradients",
        log_freq: int = 100,
        log_graph: bool = True,
    ) -> None:
        """Histograms of a model that is trained in this process: with `num_workers=0`. On workers, log them in a hook:
        `self.logger.experiment.log({"w": wandb.Histogram(...)})`."""
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    def use_artifact(self, artifact: str, artifact_type: str | None = None) -> Any:
        return self.experiment.use_artifact(artifact, type=artifact_type)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        if is_after_each(self._log_model, checkpoint_callback):
            self._log_checkpoints(checkpoint_callback)
        elif self._log_model:
            self._checkpoint_callback = checkpoint_callback

    def finalize(self, status: str) -> None:
        """The run stays open for what may follow; wandb ends it with the program, or `wandb.finish()` does."""
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
        artifact = _package().Artifact(name=name, type="model", metadata=metadata)
        artifact.add_file(saved.path, name="model.ckpt", policy=self._add_file_policy)
        self.experiment.log_artifact(artifact, aliases=["latest", "best"] if saved.is_best else ["latest"])


def _package() -> Any:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("WandbLogger needs the package wandb: pip install 'raylit[wandb]'") from error
    return wandb
