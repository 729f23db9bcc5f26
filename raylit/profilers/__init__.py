"""Profilers: where a run's time and memory go. Started in the workers; their findings come together in the driver."""

from raylit.profilers.advanced import AdvancedProfiler
from raylit.profilers.base import PassThroughProfiler, Profiler
from raylit.profilers.chosen import chosen_profiler
from raylit.profilers.simple import SimpleProfiler
from raylit.profilers.torch import PyTorchProfiler

__all__ = [
    "AdvancedProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "chosen_profiler",
]
