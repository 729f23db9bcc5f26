"""A checkpoint of a run that is over, from what the driver has of it. Driver."""

import os
from typing import Any

from torch import Tensor

from raylit.checkpoint import files, format
from raylit.errors import CheckpointError
from raylit.messages import Saved
from raylit.state import Progress


def write_last_run(
    path: str | os.PathLike[str],
    *,
    module: Any,
    datamodule: Any,
    progress: Progress,
    newest: str,
    is_weights_only: bool,
) -> None:
    """The whole run where its `newest` checkpoint is of the same step, and so has what the driver has not: optimizers,
    random states. Else, or with `is_weights_only`, weights and hyper-parameters."""
    weights = format.of_weights(module.state_dict(), progress, module=module, datamodule=datamodule)
    whole = files.read(newest) if newest and not is_weights_only and files.exists(newest) else {}
    is_of_this_step = "optimizer_states" in whole and format.progress_of(whole) == progress
    if any(isinstance(value, Tensor) and value.is_meta for value in weights["state_dict"].values()):
        if "optimizer_states" not in whole or format.progress_of(whole).global_step != progress.global_step:
            raise CheckpointError(
                "the model's weights are on the meta device, without numbers, and no checkpoint is of the run's last "
                "step: leave out FSDPStrategy(gather_weights=False), or use the checkpoints that the run has saved"
            )
        files.write(whole, path)
    elif is_of_this_step:
        files.write({**whole, "state_dict": weights["state_dict"]}, path)
    else:
        files.write(format.merge([Saved(rank=0, checkpoint=weights, of_rank={})], {}), path)
