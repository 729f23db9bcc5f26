"""raylit: the PyTorch Lightning programming model on Ray actors."""

from raylit import callbacks, metrics
from raylit.api import fit, predict, shutdown, test, validate
from raylit.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    Callback,
    DeviceStatsMonitor,
    DriverCallback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
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
from raylit.results import EvalResult, TrainResult
from raylit.seed import seed_everything
from raylit.trainer import Trainer

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "CSVLogger",
    "Callback",
    "CheckpointError",
    "CombinedLoader",
    "ConfigError",
    "DataModule",
    "DeviceStatsMonitor",
    "DriverCallback",
    "EMAWeightAveraging",
    "EarlyStopping",
    "EvalResult",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "ModelCheckpoint",
    "ModelSummary",
    "ModuleError",
    "NotFiniteError",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "RaylitError",
    "ResourcesError",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "TensorBoardLogger",
    "ThroughputMonitor",
    "Timer",
    "TrainResult",
    "Trainer",
    "UnknownArgumentError",
    "WeightAveraging",
    "WorkerDied",
    "WorkerFailed",
    "callbacks",
    "fit",
    "metrics",
    "predict",
    "seed_everything",
    "shutdown",
    "test",
    "validate",
]
