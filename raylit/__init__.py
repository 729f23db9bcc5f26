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
    ModuleError,
    NotFiniteError,
    RaylitError,
    ResourcesError,
    UnknownArgumentError,
    WorkerDied,
    WorkerFailed,
)
from raylit.loggers import CSVLogger, Logger, TensorBoardLogger
from raylit.module import LightningModule
from raylit.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler
from raylit.results import EvalResult, TrainResult
from raylit.seed import seed_everything
from raylit.trainer import Trainer

__all__ = [
    "AdvancedProfiler",
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
    "ModelCheckpoint",
    "ModelSummary",
    "ModuleError",
    "NotFiniteError",
    "PassThroughProfiler",
    "ProgressBar",
    "PyTorchProfiler",
    "RaylitError",
    "ResourcesError",
    "SimpleProfiler",
    "TQDMProgressBar",
    "TensorBoardLogger",
    "Timer",
    "TrainResult",
    "Trainer",
    "UnknownArgumentError",
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
