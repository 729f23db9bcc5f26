"""DataModule: the loaders of every stage and how their data comes to be. User's class, used on both sides."""

import inspect
from collections.abc import Iterable
from typing import Any

from raylit.hparams import AttributeDict, init_arguments, select_hyperparameters


class DataModule:
    """Override what the data needs; a subclass whose `__init__` never calls this one's works as well."""

    _hparams: AttributeDict | None = None
    _hparams_name: str = "kwargs"
    trainer: Any = None
    """The worker's view of the run, inside hooks."""

    def prepare_data(self) -> None:
        """Download, tokenize: runs in one process per host; state set here is lost, leave files."""

    def setup(self, stage: str) -> None:
        """Split, transform, assign: runs in every worker. May be defined without `stage`."""

    def teardown(self, stage: str) -> None: ...

    def train_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no train_dataloader")

    def val_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no val_dataloader")

    def test_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no test_dataloader")

    def predict_dataloader(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no predict_dataloader")

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors to keep in the checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def save_hyperparameters(self, *names: Any, ignore: str | Iterable[str] | None = None) -> None:
        """Keep the constructor's arguments (all, or the named ones) in `hparams` and in checkpoints."""
        frame = inspect.currentframe()
        assert frame is not None and frame.f_back is not None
        ignored = [ignore] if isinstance(ignore, str) else ignore or ()
        values, self._hparams_name = select_hyperparameters(names, init_arguments(self, frame.f_back), ignored)
        self.hparams.update(values)

    @property
    def hparams(self) -> AttributeDict:
        if self._hparams is None:
            self._hparams = AttributeDict()
        return self._hparams

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "trainer"}


LightningDataModule = DataModule
