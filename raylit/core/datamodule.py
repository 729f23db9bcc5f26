"""DataModule: the loaders of every stage and how their data comes to be. User's class, used on both sides."""

from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from raylit.accelerators.transfer import to_device
from raylit.core.hparams import HyperparametersMixin, read_for_rebuild, read_hyperparameters, rebuild


class DataModule(HyperparametersMixin):
    """Override what the data needs; a subclass whose `__init__` never calls this one's works as well."""

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
            hparams = read_hyperparameters(Path(hparams_file))
        datamodule = rebuild(cls, hparams, name, overrides=overrides, source=str(checkpoint_path))
        datamodule.load_state_dict(checkpoint.get(cls.__qualname__, {}))
        return datamodule

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "trainer"}


LightningDataModule = DataModule
