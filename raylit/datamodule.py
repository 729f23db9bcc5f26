"""DataModule: the loaders of every stage and how their data comes to be. User's class, used on both sides."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from typing_extensions import Self

from raylit.accelerators.transfer import to_device
from raylit.hparams import AttributeDict, copied, init_arguments, select_hyperparameters
from raylit.rebuild import hyperparameters_in, read_for_rebuild, rebuilt


class DataModule:
    """Override what the data needs; a subclass whose `__init__` never calls this one's works as well."""

    _hparams: AttributeDict | None = None
    _hparams_initial: AttributeDict | None = None
    _hparams_name: str = "kwargs"
    trainer: Any = None
    """The worker's view of the run, inside hooks."""
    prepare_data_per_node: bool = True
    """False: prepare_data runs once in all, not once per host."""

    def prepare_data(self) -> None:
        """Download, tokenize: runs in one process per host; state set here is lost, leave files."""

    def setup(self, stage: str | None = None) -> None:
        """Split, transform, assign: runs in every worker. May be defined without `stage`."""

    def teardown(self, stage: str | None = None) -> None: ...

    def train_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no train_dataloader")

    def val_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no val_dataloader")

    def test_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no test_dataloader")

    def predict_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no predict_dataloader")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch to move, in every loop and on every device; runs when the batch is needed."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on `device`: every tensor in it, and every object with a `to` of its own."""
        return to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch for the step, on the device."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors to keep in the checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def save_hyperparameters(
        self,
        *names: Any,
        ignore: str | Iterable[str] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the constructor's arguments (all, the named ones, or a dict, Namespace or dataclass) in `hparams`, in
        checkpoints and, with `logger`, in the loggers. `frame`: the constructor's, where this is called elsewhere."""
        current = inspect.currentframe()
        frame = frame or (current.f_back if current is not None else None)
        assert frame is not None
        ignored = [ignore] if isinstance(ignore, str) else ignore or ()
        values, self._hparams_name = select_hyperparameters(names, init_arguments(self, frame), ignored)
        self.hparams.update(values)
        self._hparams_initial = copied(self.hparams)
        self._is_logging_hparams = logger

    _is_logging_hparams: bool = True

    @property
    def hparams(self) -> AttributeDict:
        if self._hparams is None:
            self._hparams = AttributeDict()
        return self._hparams

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of `hparams` as they were saved."""
        return copied(self._hparams_initial or {})

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        hparams_file: str | Path | None = None,
        weights_only: bool | None = None,
        **overrides: Any,
    ) -> Self:
        """Rebuild the data module with the hyper-parameters of a checkpoint's run, or of the file; `overrides` win."""
        checkpoint = read_for_rebuild(
            checkpoint_path, hparams_file=None, overrides=overrides, allow_pickle=weights_only is False
        )
        hparams, name = checkpoint["datamodule_hyper_parameters"], checkpoint.get("datamodule_hparams_name", "kwargs")
        if hparams_file is not None:
            hparams = hyperparameters_in(Path(hparams_file))
        datamodule = rebuilt(cls, hparams, name, overrides=overrides, source=str(checkpoint_path))
        datamodule.load_state_dict(checkpoint.get(cls.__qualname__, {}))
        return datamodule

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "trainer"}


LightningDataModule = DataModule
