"""Where a stage's loaders come from: fit's arguments, else the data module, else the module. Driver and worker."""

from typing import Any

from raylit.combined_loader import CombinedLoader, holds_loaders
from raylit.datamodule import DataModule
from raylit.module import LightningModule
from raylit.worker.context import Job
from raylit.worker.hooks import is_overridden
from raylit.worker.script_objects import send_script_objects

HOOKS = {
    "train": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


def has_loader(job: Job, name: str) -> bool:
    """Whether anything offers a loader for "train", "validate", "test" or "predict"; calls no hook."""
    hook = HOOKS[name]
    if job.loaders.get(name) is not None:
        return True
    return _offers(job.datamodule, hook, DataModule) or _offers(job.module, hook, LightningModule)


def is_from_hook(job: Job, name: str) -> bool:
    """Whether a hook makes the loader, which can do so again."""
    return job.loaders.get(name) is None


def loader_of(job: Job, name: str) -> Any:
    """The loader, or what the hook returns; None where nothing offers one."""
    loader = _given_or_made(job, name)
    if job.shared_memory is not None:
        for leaf in CombinedLoader(loader).flattened:
            send_script_objects(leaf)
    return loader


def _given_or_made(job: Job, name: str) -> Any:
    given = job.loaders.get(name)
    if given is not None:
        return given
    hook = HOOKS[name]
    if _offers(job.datamodule, hook, DataModule):
        return getattr(job.datamodule, hook)()
    return getattr(job.module, hook)() if _offers(job.module, hook, LightningModule) else None


def loaders_of(job: Job, name: str) -> list[Any]:
    """For an evaluation: one loader or several, as a list. A CombinedLoader is one, unless it is "sequential"."""
    loaders = loader_of(job, name)
    if loaders is None:
        return []
    if isinstance(loaders, CombinedLoader):
        return loaders.flattened if loaders.mode == "sequential" else [loaders]
    if isinstance(loaders, dict) or holds_loaders(loaders):
        return CombinedLoader(loaders, "sequential").flattened
    # A list without any loader in it is one: its items are batches.
    return [] if isinstance(loaders, (list, tuple)) and not loaders else [loaders]


def _offers(owner: Any, hook: str, base: type) -> bool:
    # A data module need not be a DataModule by class: what has the hook is taken at its word.
    return owner is not None and is_overridden(hook, owner, base)
