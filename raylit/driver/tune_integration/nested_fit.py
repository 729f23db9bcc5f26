"""Fit inside a function that Ray Tune or Ray Train has called. Driver.

It reports to Tune or Train, and continues from the reported checkpoint if the function has been restored.
"""

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raylit.callbacks.base import DriverCallback
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.perturbed import PerturbedHyperparameters
from raylit.checkpoint import files
from raylit.driver.tune_integration.report_callback import FILE, TuneReport
from raylit.driver.tune_integration.session import RaySession, current_session
from raylit.storage import absolute, join
from raylit.worker.job import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class NestedFit:
    """Arguments of a fit after the surrounding Tune or Train session has added its own."""

    job: Job
    callbacks: list[DriverCallback]
    checkpoint: dict[str, Any] | None = None
    """Checkpoint from which the fit of a restored function continues."""


class _FitCounter(threading.local):
    """Count of the fits of a function that Ray has called; each call has a thread of its own."""

    num_started = 0
    last_report: TuneReport | None = None
    """The TuneReport of the previous fit."""


_fit_counter = _FitCounter()


def detect_tune_session(job: Job, callbacks: Sequence[DriverCallback], *, is_continued: bool) -> NestedFit:
    """Add a TuneReport if the user has given none, and find the checkpoint to continue from. Called once per fit.

    `is_continued`: the user has said which checkpoint this fit continues from.
    """
    session = current_session()
    reports = [callback for callback in callbacks if isinstance(callback, TuneReport)]
    for report in reports:
        report.attach(None, {})
    if session is None:
        return NestedFit(job=job, callbacks=list(callbacks))
    number, _fit_counter.num_started = _fit_counter.num_started, _fit_counter.num_started + 1
    if not reports:
        is_saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        has_reported = _has_reported_itself(session, _fit_counter.last_report)
        reports = [TuneReport.automatic(report=not has_reported, save_checkpoints=is_saving)]
    _fit_counter.last_report = reports[-1]
    for report in reports:
        report.attach(session, {"fit": number, "config": _hash_config(session.config)})
    others = [callback for callback in callbacks if not isinstance(callback, TuneReport)]
    nested_fit = NestedFit(job=job, callbacks=[*others, *reports])  # last, so that it sees the results of the others
    if number > 0 or is_continued or not any(report.is_reporting for report in reports):
        return nested_fit
    return _restore_fit(session, nested_fit)


def _has_reported_itself(session: RaySession, last_report: TuneReport | None) -> bool:
    """Return True if the function has reported a result between its last fit and this one.

    Before its first fit that is unknown: Tune keeps counting from one trial of an actor to the next.
    """
    return last_report is not None and session.num_reports != last_report.num_reports


def _restore_fit(session: RaySession, nested_fit: NestedFit) -> NestedFit:
    """Set the checkpoint that the function is restored from, if a fit has reported it."""
    checkpoint = session.checkpoint
    notes = None if checkpoint is None else checkpoint.get_metadata().get("raylit")
    if notes is None:
        return nested_fit
    if notes["fit"] > 0:
        warnings.warn(
            f"{session.name} is restored from a checkpoint of its fit number {notes['fit'] + 1} and begins anew: which "
            "fit is to go on from tune.get_checkpoint(), say by ckpt_path, and leave out those before it",
            stacklevel=4,
        )
        return nested_fit
    with checkpoint.as_directory() as directory:
        restored = files.read(os.path.join(directory, FILE))
    # Tune moves trials, and also hands out checkpoints of others: a ModelCheckpoint starts anew if its files are
    # elsewhere.
    checkpoint_callbacks = [callback for callback in nested_fit.callbacks if isinstance(callback, ModelCheckpoint)]
    directories = [
        callback.dirpath or join(absolute(nested_fit.job.log_dir), "checkpoints") for callback in checkpoint_callbacks
    ]
    for key, state in list(restored["callbacks"].items()):
        if key.startswith(ModelCheckpoint.__name__) and state.get("dirpath") not in directories:
            del restored["callbacks"][key]
    if notes["config"] == _hash_config(session.config):
        return replace(nested_fit, checkpoint=restored)
    # A better trial's checkpoint, as population based training hands out.
    job = replace(nested_fit.job, callbacks=[*nested_fit.job.callbacks, PerturbedHyperparameters()])
    return replace(nested_fit, job=job, checkpoint=restored)


def _hash_config(config: Mapping[str, Any]) -> str:
    """Return a hash that is equal for configs of equal plain values, in any process."""
    text = json.dumps(config, sort_keys=True, skipkeys=True, default=_to_json_value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _to_json_value(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else type(value).__qualname__
