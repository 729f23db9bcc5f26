"""raylit: the PyTorch Lightning programming model on Ray actors."""

from raylit import callbacks, metrics
from raylit.accelerators import Accelerator, register_accelerator
from raylit.api import fit, lr_find, predict, scale_batch_size, shutdown, test, tune, validate
from raylit.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    DriverCallback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
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
from raylit.config import DDPStrategy, FSDPStrategy
from raylit.core.combined_loader import CombinedLoader
from raylit.core.datamodule import DataModule, LightningDataModule
from raylit.core.module import LightningModule
from raylit.core.step_results import EvalResult, TrainResult
from raylit.core.trainer_view import TrainerView
from raylit.driver.tune_integration import TuneReport
from raylit.errors import (
    CheckpointError,
    ConfigError,
    DamagedCheckpoint,
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
from raylit.profilers import AdvancedProfiler, PassThroughProfiler, PyTorchProfiler, SimpleProfiler
from raylit.seed import seed_everything
from raylit.strategies import register_strategy
from raylit.trainer.trainer import Trainer
from raylit.tune.sweep.result import SweepResult
from raylit.tune.sweep.sweep import sweep
from raylit.tune.tuner import Tuner

__all__ = [
    "Accelerator",
    "AdvancedProfiler",
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "CSVLogger",
    "Callback",
    "CheckpointError",
    "CombinedLoader",
    "ConfigError",
    "DDPStrategy",
    "DamagedCheckpoint",
    "DataModule",
    "DeviceStatsMonitor",
    "DriverCallback",
    "EMAWeightAveraging",
    "EarlyStopping",
    "EvalResult",
    "FSDPStrategy",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "LoggingError",
    "MLFlowLogger",
    "ModelCheckpoint",
    "ModelSummary",
    "ModuleError",
    "NotFiniteError",
    "OnExceptionCheckpoint",
    "PassThroughProfiler",
    "ProgressBar",
    "PyTorchProfiler",
    "RaylitError",
    "ResourcesError",
    "SimpleProfiler",
    "StochasticWeightAveraging",
    "SweepResult",
    "TQDMProgressBar",
    "TensorBoardLogger",
    "ThroughputMonitor",
    "Timer",
    "TrainResult",
    "Trainer",
    "TrainerView",
    "TuneReport",
    "Tuner",
    "UnknownArgumentError",
    "WandbLogger",
    "WeightAveraging",
    "WorkerDied",
    "WorkerFailed",
    "callbacks",
    "fit",
    "lr_find",
    "metrics",
    "predict",
    "register_accelerator",
    "register_strategy",
    "scale_batch_size",
    "seed_everything",
    "shutdown",
    "sweep",
    "test",
    "tune",
    "validate",
]
