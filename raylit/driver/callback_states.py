"""CallbackStates: what the driver's callbacks keep in checkpoints, in those that workers write, too. Driver."""

import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from raylit.callbacks.base import DriverCallback
from raylit.checkpoint import format
from raylit.errors import CheckpointError
from raylit.messages import Command, HookedCommand


class CallbackStates:
    """Remembers what the workers have been told last."""

    def __init__(self, callbacks: Sequence[DriverCallback]) -> None:
        self._callbacks = callbacks
        self._told = b""

    def taken(self) -> dict[str, Any]:
        return {callback.state_key: state for callback in self._callbacks if (state := callback.state_dict())}

    def reset(self) -> None:
        """A new run begins."""
        for callback in self._callbacks:
            callback.reset_state()

    def load(self, checkpoint: dict[str, Any]) -> None:
        for callback in self._callbacks:
            if callback.state_key in checkpoint.get("callbacks", {}):
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])

    def sent_with(self, command: Command) -> Command:
        """The command with what has changed. The workers stand still, so it holds for as long as this one runs."""
        if not isinstance(command, HookedCommand):
            return command
        try:
            states = pickle.dumps(format.plain(self.taken(), "a driver callback's state"))
        except CheckpointError:  # only who saves needs to be told, and the driver's own saves do
            return command
        if states == self._told:
            return command
        self._told = states
        return replace(command, callback_states=states)
