"""What becomes of a fit inside a function that Ray Tune or Ray Train has called: it reports to them, and where the
function has been restored it goes on from where that was. Driver."""

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
    """A fit, as its surroundings would have it."""

    job: Job
    callbacks: list[DriverCallback]
    checkpoint: dict[str, Any] | None = None
    """What a restored function goes on from."""


class _Fits(threading.local):
    """Counts the fits of a function that Ray has called: each call has a thread of its own."""

    num_begun = 0
    last_report: TuneReport | None = None
    """That of the fit before this one."""


_fits = _Fits()


def detect_tune_session(job: Job, callbacks: Sequence[DriverCallback], *, is_continued: bool) -> NestedFit:
    """Add a TuneReport where the user has given none, and find the checkpoint to continue from. Called once per fit.

    `is_continued`: the user has said which checkpoint this fit continues from.
    """
    session = current_session()
    reports = [callback for callback in callbacks if isinstance(callback, TuneReport)]
    for report in reports:
        report.attach(None, {})
    if session is None:
        return NestedFit(job=job, callbacks=list(callbacks))
    number, _fits.num_begun = _fits.num_begun, _fits.num_begun + 1
    if not reports:
        is_saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        is_reported = _has_reported_itself(session, _fits.last_report)
        reports = [TuneReport.automatic(report=not is_reported, save_checkpoints=is_saving)]
    _fits.last_report = reports[-1]
    for report in reports:
        report.attach(session, {"fit": number, "config": _digest(session.config)})
    others = [callback for callback in callbacks if not isinstance(callback, TuneReport)]
    inside = NestedFit(job=job, callbacks=[*others, *reports])  # last, so that it sees what the others have done
    if number > 0 or is_continued or not any(report.is_reporting for report in reports):
        return inside
    return _restored(session, inside)


def _has_reported_itself(session: RaySession, last_report: TuneReport | None) -> bool:
    """Return True if the function has reported a result between its last fit and this one.

    Before its first fit that cannot be known: Tune's count goes on from one trial of an actor to the next.
    """
    return last_report is not None and session.num_reports != last_report.num_reports


def _restored(session: RaySession, inside: NestedFit) -> NestedFit:
    """With the checkpoint that the function is restored from, where a fit has reported it."""
    checkpoint = session.checkpoint
    notes = None if checkpoint is None else checkpoint.get_metadata().get("raylit")
    if notes is None:
        return inside
    if notes["fit"] > 0:
        warnings.warn(
            f"{session.name} is restored from a checkpoint of its fit number {notes['fit'] + 1} and begins anew: which "
            "fit is to go on from tune.get_checkpoint(), say by ckpt_path, and leave out those before it",
            stacklevel=4,
        )
        return inside
    with checkpoint.as_directory() as directory:
        restored = files.read(os.path.join(directory, FILE))
    # Tune moves trials, and hands out those of others: a ModelCheckpoint begins anew where its files are not.
    savers = [callback for callback in inside.callbacks if isinstance(callback, ModelCheckpoint)]
    places = [saver.dirpath or join(absolute(inside.job.log_dir), "checkpoints") for saver in savers]
    for key, state in list(restored["callbacks"].items()):
        if key.startswith(ModelCheckpoint.__name__) and state.get("dirpath") not in places:
            del restored["callbacks"][key]
    if notes["config"] == _digest(session.config):
        return replace(inside, checkpoint=restored)
    # A better trial's checkpoint, as population based training hands them out.
    job = replace(inside.job, callbacks=[*inside.job.callbacks, PerturbedHyperparameters()])
    return replace(inside, job=job, checkpoint=restored)


def _digest(config: Mapping[str, Any]) -> str:
    """Equal for configs of equal plain values, in any process."""
    text = json.dumps(config, sort_keys=True, skipkeys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else type(value).__qualname__
