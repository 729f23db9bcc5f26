"""raylit: the PyTorch Lightning programming model on Ray actors."""

from raylit import metrics
from raylit.api import fit, predict, shutdown, test, validate
from raylit.callbacks.base import Callback, DriverCallback
from raylit.callbacks.early_stopping import EarlyStopping
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.model_summary import ModelSummary
from raylit.callbacks.progress_bar import ProgressBar, TQDMProgressBar
from raylit.callbacks.timer import Timer
from raylit.combined_loader import CombinedLoader
from raylit.datamodule import DataModule, LightningDataModule
from raylit.errors import (
    CheckpointError,
    ConfigError,
    LoggingError,
    ModuleError,
    NotFiniteError,
    RaylitError,
    ResourcesError,
    UnknownArgumentError,
    WorkerDied,
    WorkerFailed,
)
from raylit.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from raylit.module import LightningModule
from raylit.results import EvalResult, TrainResult
from raylit.seed import seed_everything
from raylit.trainer import Trainer

__all__ = [
    "CSVLogger",
    "Callback",
    "CheckpointError",
    "CombinedLoader",
    "ConfigError",
    "DataModule",
    "DriverCallback",
    "EarlyStopping",
    "EvalResult",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "LoggingError",
    "MLFlowLogger",
    "ModelCheckpoint",
    "ModelSummary",
    "ModuleError",
    "NotFiniteError",
    "ProgressBar",
    "RaylitError",
    "ResourcesError",
    "TQDMProgressBar",
    "TensorBoardLogger",
    "Timer",
    "TrainResult",
    "Trainer",
    "UnknownArgumentError",
    "WandbLogger",
    "WorkerDied",
    "WorkerFailed",
    "fit",
    "metrics",
    "predict",
    "seed_everything",
    "shutdown",
    "test",
    "validate",
]
