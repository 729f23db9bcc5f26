"""What averages of weights need where a rank has shards of them: its own part, and a way into checkpoints. Worker."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from raylit.compat.torch_module import build_flat_module
from raylit.strategies.parts import is_sharded

CURRENT = "current_weight"
"""Among an optimizer's state in a checkpoint: the weight that training goes on with, where the module's is an average.
"""


def has_shards(module: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in module.parameters())


def own_part(module: nn.Module) -> nn.Module:
    """Its parameters and buffers by their names, in a module that can be copied: of shards this rank's, in the same
    memory."""
    for part in module.modules():
        if isinstance(reshard := getattr(part, "reshard", None), MethodType):
            reshard()  # an evaluation may not be over yet, which keeps some gathered
    if not has_shards(module):
        return module
    own = (
        (name, nn.Parameter(_local(parameter.detach()), requires_grad=parameter.requires_grad))
        for name, parameter in module.named_parameters()
    )
    return build_flat_module(own, module.named_buffers())


class ShardedAverage:
    """Lets each rank write its part of an average: as the module's weights, beside the current ones among the
    optimizers' states, until `close`."""

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        *,
        average: nn.Module,
        has_average: Callable[[], bool],
        is_swapped: Callable[[], bool],
    ) -> None:
        """`average`: its values are as `own_part` has the module's, and count once it `has_average`; while
        `is_swapped` each has the other's."""
        self._average = average
        self._has_average = has_average
        self._is_swapped = is_swapped
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._hooks: list[RemovableHandle] = [module.register_state_dict_post_hook(partial(self._put_average))]
        self._hooks += [optimizer.register_state_dict_post_hook(self._add_current) for optimizer in optimizers]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _put_average(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        if self._is_swapped() or not self._has_average():
            return
        averages = {**dict(self._average.named_parameters()), **dict(self._average.named_buffers())}
        # A parameter may have several names.
        known = {name: self._names[id(one)] for name, one in module.named_parameters(remove_duplicate=False)}
        for name, value in state_dict.items():
            average = averages.get(known.get(name, name))
            if average is not None and isinstance(value, Tensor):
                state_dict[name] = _as_part_of(value, average.detach())

    def _add_current(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not self._has_average():
            return state_dict
        averages = dict(self._average.named_parameters())
        state = dict(state_dict["state"])
        for index, parameter in _indexed(optimizer, state_dict):
            current = parameter.detach()
            if self._is_swapped():
                current = _as_part_of(current, averages[self._names[id(parameter)]].detach())
            state[index] = {**state.get(index, {}), CURRENT: current}
        return {**state_dict, "state": state}


def take_current(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Before an optimizer loads its state: current weights of a checkpoint with an average go to the parameters."""
    state = dict(state_dict["state"])
    for index, parameter in _indexed(optimizer, state_dict):
        if CURRENT in (own := state.get(index, {})):
            parameter.detach().copy_(own[CURRENT])
            rest = {name: value for name, value in own.items() if name != CURRENT}
            state[index] = rest
            if not rest:
                del state[index]
    return {**state_dict, "state": state}


def _indexed(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterator[tuple[int, nn.Parameter]]:
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        yield from zip(saved["params"], group["params"], strict=True)


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


def _as_part_of(whole: Any, local: Tensor) -> Tensor:
    if not is_sharded(whole):
        return local
    made: Tensor = type(whole).from_local(
        local.to(whole.device),
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return made
