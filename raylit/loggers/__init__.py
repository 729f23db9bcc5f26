"""Where the driver sends metrics and hyper-parameters. Driver only."""

from raylit.loggers.base import Logger
from raylit.loggers.csv import CSVLogger
from raylit.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger"]
