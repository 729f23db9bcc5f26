"""Callbacks that run on every worker, and callbacks that control the run from the driver. Open `base.py` first."""

from raylit.callbacks.argument_callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelSummary,
)
from raylit.callbacks.base import Callback, DriverCallback, LambdaCallback
from raylit.callbacks.early_stopping import EarlyStopping
from raylit.callbacks.finetuning import BackboneFinetuning, BaseFinetuning
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.monitors import DeviceStatsMonitor, LearningRateMonitor, ThroughputMonitor
from raylit.callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from raylit.callbacks.prediction_writer import BasePredictionWriter
from raylit.callbacks.progress_bar import ProgressBar, TQDMProgressBar
from raylit.callbacks.timer import Timer
from raylit.callbacks.weight_averaging import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

__all__ = [
    "BackboneFinetuning",
    "BaseFinetuning",
    "BasePredictionWriter",
    "BatchSizeFinder",
    "Callback",
    "DeviceStatsMonitor",
    "DriverCallback",
    "EMAWeightAveraging",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "ProgressBar",
    "StochasticWeightAveraging",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightAveraging",
]
