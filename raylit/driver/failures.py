"""What went wrong in the workers, as one exception in the driver. Driver, and `failure` in the worker process."""

import itertools
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Sequence

import cloudpickle
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
)

from raylit.compat import ray_core
from raylit.compat.torch_loader_death import find_loader_death
from raylit.driver.process_end import memory_in_use, read_log_end
from raylit.errors import RaylitError, RemoteTraceback, WorkerDied, WorkerFailed, is_frame_hidden, is_traceback_full
from raylit.messages import Failed
from raylit.worker.context import WorkerContext

DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)
"""What Ray answers in place of an actor that has died."""


def failure(error: BaseException, context: WorkerContext) -> Failed:
    """For the driver, in the worker."""
    error = _with_reason(error)
    told = traceback.TracebackException.from_exception(error)
    _hide_frames(told)
    pickled: bytes | None
    try:
        pickled = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)
    except Exception:
        pickled = None
    return Failed(
        rank=context.rank,
        host=context.host,
        traceback="".join(told.format()),
        summary="".join(told.format_exception_only()).strip().splitlines()[0],
        error=pickled,
        is_consequence=isinstance(error, Exception) and _is_consequence(error),
        is_harmless=is_harmless(error),
    )


def is_harmless(error: BaseException) -> bool:
    """To the process that it was raised in: a user's mistake, which says nothing of memory, a device or a peer."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    return all(
        isinstance(each, Exception)
        and not isinstance(each, (MemoryError, WorkerDied, WorkerFailed))
        and not _is_consequence(each)
        and not (isinstance(each, (RuntimeError, OSError)) and _HARMFUL.search(str(each)))
        for each in chain
    )


def is_at_one_line(failures: Sequence[Failed]) -> bool:
    """Every rank has failed in the same way at the same place: none is ahead of the others in what they do together."""
    return len({(failure.summary, failure.traceback) for failure in failures}) == 1


def words_of(error: BaseException) -> str:
    """The traceback, without the frames that are raylit's or Ray's: the worker's where it was raised there. For where
    the exception itself cannot go."""
    if isinstance(error.__cause__, RemoteTraceback):
        return error.__cause__.text.strip()
    told = traceback.TracebackException.from_exception(error)
    _hide_frames(told)
    return "".join(told.format()).strip()


def raise_failures(failures: Sequence[Failed], *, num_workers: int) -> None:
    """Raise one exception as itself, its cause being the traceback in the worker: of those that came first the lowest
    rank's, rather not one that follows from another. The others are listed below it."""
    primary = [failure for failure in failures if not failure.is_consequence] or list(failures)
    # The first to arrive, together with the ranks that failed in the same way.
    same = sorted((it for it in primary if it.summary == primary[0].summary), key=lambda failure: failure.rank)
    first = same[0]
    ranks = ", ".join(str(failure.rank) for failure in same)
    where = f"{'rank' if len(same) == 1 else 'ranks'} {ranks} of {num_workers} on host {first.host}"
    others = [f"rank {failure.rank}: {failure.summary}" for failure in failures if failure not in same]
    text = f"In {where}:\n{first.traceback}" + "".join(f"\nMeanwhile in {line}" for line in others)
    cause = RemoteTraceback(text)
    if first.error is None:
        raise WorkerFailed(f"an exception that cannot be pickled ended {where}: {first.summary}") from cause
    error = cloudpickle.loads(first.error)
    if isinstance(error, SystemExit):
        # Python ends without a word on it, in whichever process it was called.
        line = call_in(first.traceback, is_last_innermost=True)
        sys.stderr.write(f"raylit: sys.exit({error.code!r}) in {where}{f' ({line})' if line else ''} ends the run\n")
    raise error from cause


def reason_of_death(error: BaseException, exit_words: str | None) -> str:
    """From what Ray says of it and, where it is known, how the process has ended."""
    if isinstance(error, ActorUnavailableError):
        return exit_words or "it cannot be reached"
    text = " ".join(str(error).split())
    is_actor_dead = isinstance(error, ActorDiedError)
    if isinstance(error, OutOfMemoryError) or (is_actor_dead and ray_core.is_memory_monitor_kill(text)):
        used = ray_core.parse_memory_use(text)
        in_use = f"{used[0]} of {used[1]} GB were in use" if used is not None else memory_in_use()
        return f"killed by Ray's memory monitor, as its host ran out of memory ({in_use})"
    if not isinstance(error, ActorDiedError):
        return exit_words or f"its stream of reports ended ({error or type(error).__name__})"
    if error.preempted:
        return "its host was preempted: the cluster has drained it"
    if exit_words is not None:
        return exit_words
    if (why := ray_core.parse_lost_host(text)) is not None:
        return f"Ray has lost its host ({why or 'it does not say why'})"
    if (code := ray_core.parse_exit_code(text)) is not None:
        by = ", after a SIGTERM" if ray_core.is_exit_by_sigterm(text) else ""
        return f"its process ended with exit code {code}{by}"
    if ray_core.is_connection_lost(text):
        return (
            "its process ended without a word: killed (out of memory?), crashed in a library, or ended by os._exit. "
            "The kernel's log on its host (dmesg) tells of the first two"
        )
    return ray_core.strip_preamble(text)


def last_words(log_path: str) -> str:
    """What gloo has said as it ended the process, and where the process's Python code was, to be put behind the reason;
    "" where it was not gloo, or on another host."""
    text = read_log_end(log_path)
    said = re.findall(r"what\(\): (.*)", text)
    if not said or "gloo" not in text:
        return ""
    where = call_in(text.rpartition("Fatal Python error")[2])
    words = _ADDRESS.split(said[-1])[0].strip()
    return (
        f". gloo's last words: {words} A rank was in another collective than one that it spoke to, or had a tensor of "
        "another shape: every rank has to call the same collectives in the same order"
        + (f". This rank was at {where}" if where else "")
    )


def call_in(traceback_text: str, *, is_last_innermost: bool = False) -> str:
    """The innermost line of the user's in a traceback; "" where there is none. faulthandler's begin with it."""
    frames = re.findall(r'File "([^"]+)", line (\d+)(?:,)? in (\S+)', traceback_text)
    own = [
        f"{file}:{line} in {function}"
        for file, line, function in (reversed(frames) if is_last_innermost else frames)
        if not file.startswith((_TORCH, _PYTHON)) and not is_frame_hidden(file)
    ]
    return own[0] if own else ""


_PYTHON = os.path.dirname(threading.__file__) + os.sep
_ADDRESS = re.compile(r"/\S+\(\S*\+0x|$")
"""Ray's list of frames of C begins on the same line."""
_EXIT_S = 0.5
"""For the kernel to have the exit status of a dying process."""
_TORCH = os.path.dirname(torch.__file__) + os.sep
_HARMFUL = re.compile(r"memory|alloc|\b(CUDA|HIP|XLA)\b|cuda|cu(DNN|BLAS|FFT|SOLVER|SPARSE)|device-side", re.IGNORECASE)
_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|\bgloo\b|\bNCCL\b|ProcessGroup|TCPStore|watchdog",
    re.IGNORECASE,
)


def _with_reason(error: BaseException) -> BaseException:
    """Where a DataLoader's process dies while a batch of its is on the way, torch may only see a connection end."""
    deadline = time.monotonic() + _EXIT_S
    while isinstance(error, (ConnectionError, EOFError)) and time.monotonic() < deadline:
        if (death := find_loader_death()) is not None:
            death.__cause__ = error
            return death
        time.sleep(0.02)
    return error


def _is_consequence(error: Exception) -> bool:
    """What a collective says when a peer has left."""
    kinds = {"DistBackendError", "DistNetworkError", "DistStoreError"}
    return type(error).__name__ in kinds or (type(error) is RuntimeError and bool(_CONSEQUENCE.search(str(error))))


def _hide_frames(told: traceback.TracebackException | None) -> None:
    """Of an exception and all that led to it."""
    while told is not None:
        if not is_traceback_full():
            shown = [frame for frame in told.stack if not is_frame_hidden(frame.filename)]
            # What stands between raylit and the user's first line: torch's wrappers around a module.
            inner = list(itertools.dropwhile(lambda frame: frame.filename.startswith(_TORCH), shown))
            if shown or (told.exc_type is not None and issubclass(told.exc_type, RaylitError)):
                told.stack[:] = inner or shown
            # Else it is a mistake of raylit's own, which only its frames can explain.
        for member in getattr(told, "exceptions", None) or ():
            _hide_frames(member)
        _hide_frames(told.__cause__)
        told = told.__context__
