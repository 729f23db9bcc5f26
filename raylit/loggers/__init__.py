"""Loggers, to which the driver sends metrics and hyper-parameters. Driver only. Open `base.py` first."""

from raylit.loggers.base import Logger
from raylit.loggers.csv import CSVLogger
from raylit.loggers.mlflow import MLFlowLogger
from raylit.loggers.tensorboard import TensorBoardLogger
from raylit.loggers.wandb import WandbLogger

__all__ = ["CSVLogger", "Logger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"]
