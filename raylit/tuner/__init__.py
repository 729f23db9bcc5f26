"""The simple searches of `auto_lr_find` and `auto_scale_batch_size`: short fits of a copy of the model. Driver."""

from raylit.tuner.learning_rate import LearningRateFinder
from raylit.tuner.tuner import Tuner

__all__ = ["LearningRateFinder", "Tuner"]
