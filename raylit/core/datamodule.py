"""DataModule: loaders of every stage, and preparation of their data. A user's class. Driver and workers."""

from pathlib import Path
from typing import Any

import torch
from typing_extensions import Self

from raylit.accelerators.transfer import to_device
from raylit.core.hparams import HyperparametersMixin, read_for_rebuild, read_hyperparameters, rebuild
from raylit.core.trainer_view import TrainerView


class DataModule(HyperparametersMixin):
    """Base of data modules: override the loaders and hooks that the data needs.

    A subclass whose `__init__` does not call this one's works as well.
    """

    trainer: TrainerView | None = None
    """The worker's view of the run, inside hooks."""
    prepare_data_per_node: bool = True
    """False: prepare_data runs in one process overall, instead of one per host."""

    def prepare_data(self) -> None:
        """Download or tokenize; called in one process per host. State set here is lost: leave files."""

    def setup(self, stage: str | None = None) -> None:
        """Split, transform, assign; called in every worker. May be defined without `stage`."""

    def teardown(self, stage: str | None = None) -> None: ...

    def train_dataloader(self) -> Any:
        """Return the training loader, or a collection of loaders."""
        raise NotImplementedError(f"{type(self).__name__} has no train_dataloader")

    def val_dataloader(self) -> Any:
        """Return the validation loader, or a list of loaders."""
        raise NotImplementedError(f"{type(self).__name__} has no val_dataloader")

    def test_dataloader(self) -> Any:
        """Return the test loader, or a list of loaders."""
        raise NotImplementedError(f"{type(self).__name__} has no test_dataloader")

    def predict_dataloader(self) -> Any:
        """Return the prediction loader, or a list of loaders."""
        raise NotImplementedError(f"{type(self).__name__} has no predict_dataloader")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch to move to the device; called in every loop, on every device, when the batch is needed."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch on `device`: every tensor in it, and every object with a `to` method."""
        return to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Return the batch for the step; it is on the device."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors to store in the checkpoint."""
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
        """Rebuild the data module with the hyper-parameters of a checkpoint's run.

        Args:
            checkpoint_path: A path or a URL that fsspec knows.
            hparams_file: YAML or CSV file with hyper-parameters, used instead of the checkpoint's.
            weights_only: False unpickles hyper-parameters that are not plain values: only for files that you trust.
            **overrides: Arguments of the constructor, which win over the saved ones.

        Raises:
            CheckpointError: if the file is missing, damaged, or lacks arguments of the constructor.
        """
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
