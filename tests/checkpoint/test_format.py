"""What is in a checkpoint, and that torch.load(weights_only=True) reads it."""

import collections
import dataclasses
import enum
import io
import random
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from raylit.checkpoint import format
from raylit.errors import CheckpointError
from raylit.protocol.messages import Saved
from raylit.protocol.state import Progress


@dataclasses.dataclass
class Settings:
    width: int


class Color(enum.Enum):
    RED = 1


Point = collections.namedtuple("Point", "x y")


def stored(value: Any) -> Any:
    """Return the value after torch.save and torch.load(weights_only=True)."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# plain


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -3,
        1 << 200,
        -0.5,
        float("inf"),
        1 + 2j,
        "text",
        b"\xff\x00",
        bytearray(b"ab"),
        [1, ["a", (2.5, None)]],
        {"a": {1: "b", (1, 2): 3, None: 4}},
        {1, 2},
        collections.OrderedDict(b=1, a=2),
        collections.Counter([30, 60, 60]),
        torch.Size([2, 3]),
        torch.bfloat16,
        torch.device("cuda:1"),
        torch.strided,
    ],
    ids=repr,
)
def test_plain_values_come_back_equal_and_of_their_type(value: Any) -> None:
    back = stored(format.to_plain_values(value, "value"))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (Path("runs") / "a", "runs/a"),
        (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
        (b"", bytearray()),
    ],
    ids=repr,
)
def test_other_common_values_become_plain_ones(value: Any, expected: Any) -> None:
    back = stored(format.to_plain_values({"x": [value]}, "value"))["x"][0]
    assert back == expected
    assert type(back) is type(expected)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.uint32).reshape(2, 3),
        np.array(2.5),
        np.arange(4, dtype=np.int16)[::-1],
        np.arange(4, dtype=">f4"),
        np.broadcast_to(np.float64(3), (2,)),
    ],
    ids=["uint32", "0-d", "reversed", "big-endian", "read-only"],
)
def test_arrays_become_tensors_of_the_same_values(array: np.ndarray) -> None:
    back = stored(format.to_plain_values(array, "array"))
    assert np.array_equal(back.numpy(), array)
    assert back.numpy().dtype == array.dtype.newbyteorder("=")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Color.RED, r"state\['a'\]\[1\] is of type .*Color.*\.value"),
        (lambda: 0, r"state\['a'\]\[1\] is of type builtins.function"),
        (nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (Settings(1), "Settings"),
        (Point(1, 2), "Point"),
        (torch.Generator(), "Generator"),
        (frozenset({1}), "frozenset"),
        (np.array(["a", "b"]), "ndarray"),
        (1 << 3000, "builtins.int"),
        ({torch.zeros(1): 1}, r"a key of state\['a'\]\[1\].*item"),
        ({"b": {Color.RED: 1}}, r"the key <Color.RED: 1> of state\['a'\]\[1\]\['b'\]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_error_for_a_value_that_is_not_plain_has_its_place_and_type(value: Any, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        format.to_plain_values({"a": [0, value]}, "state")


def test_tensors_lose_gradient_and_attributes_but_share_their_storage() -> None:
    parameter = nn.Parameter(torch.ones(1000))
    tagged = torch.ones(2)
    tagged.owner = Settings(1)  # type: ignore[attr-defined]
    value = format.to_plain_values({"encoder": parameter, "decoder": parameter, "tagged": tagged}, "state_dict")
    assert value["encoder"].data_ptr() == parameter.data_ptr()
    back = stored(value)
    assert not back["encoder"].requires_grad
    assert back["encoder"].data_ptr() == back["decoder"].data_ptr()
    assert torch.equal(back["tagged"], tagged)


def test_a_state_dict_keeps_the_versions_of_its_modules() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    back = stored(format.to_plain_values(module.state_dict(), "state_dict"))
    assert back._metadata == module.state_dict()._metadata  # type: ignore[attr-defined]
    nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).load_state_dict(back)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.1)),
        lambda parameters: torch.optim.RMSprop(parameters, centered=True),
        lambda parameters: torch.optim.Adagrad(parameters),
        lambda parameters: torch.optim.LBFGS(parameters),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop", "adagrad", "lbfgs"],
)
def test_an_optimizer_continues_from_its_stored_state(make: Any) -> None:
    def trained(steps: int, state: dict[str, Any] | None = None, start: torch.Tensor | None = None) -> Any:
        weight = nn.Parameter(torch.ones(3) if start is None else start.clone())
        optimizer = make([weight])
        if state is not None:
            optimizer.load_state_dict(state)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((weight - torch.tensor([1.0, 2.0, 3.0])) ** 4).sum()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        return weight.detach(), optimizer.state_dict()

    half, state = trained(2)
    resumed, _ = trained(2, stored(format.to_plain_values(state, "optimizer_states[0]")), half)
    whole, _ = trained(4)
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 2, 2]),
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (epoch + 1)),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10),
        lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, step_size_up=2),
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)], [2]
        ),
    ],
    ids=["multistep", "lambda", "onecycle", "restarts", "cyclic", "sequential"],
)
def test_a_scheduler_continues_from_its_stored_state(make: Any) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        return optimizer, make(optimizer)

    def rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
        seen = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    whole = rates(*fresh(), 6)
    optimizer, scheduler = fresh()
    rates(optimizer, scheduler, 3)
    states = stored(format.to_plain_values([optimizer.state_dict(), scheduler.state_dict()], "states"))
    resumed_optimizer, resumed = fresh()
    resumed_optimizer.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert rates(resumed_optimizer, resumed, 3) == whole[3:]


# Hyper-parameters


def test_plain_hyper_parameters_stay_readable_under_their_own_names() -> None:
    hparams = {"lr": 0.1, "sizes": [1, 2], "backbone": None, "betas": (0.9, 0.99)}
    back = stored(format.pack_hyper_parameters(hparams))
    assert back == hparams
    assert format.unpack_hyper_parameters(back) == hparams


def test_a_path_is_restored_as_a_path_without_allow_pickle() -> None:
    back = stored(format.pack_hyper_parameters({"data_dir": Path("/data/mnist")}))
    assert format.unpack_hyper_parameters(back) == {"data_dir": Path("/data/mnist")}


def test_objects_are_restored_with_allow_pickle() -> None:
    layer = nn.Linear(3, 2)
    hparams = {
        "lr": 0.1,
        "layer": layer,
        "activation": lambda x: x + 1,
        "settings": Settings(8),
        "color": Color.RED,
        "corner": Point(1, 2),
        "layers": {"first": [layer]},
    }
    back = format.unpack_hyper_parameters(stored(format.pack_hyper_parameters(hparams)), allow_pickle=True)
    assert torch.equal(back["layer"].weight, layer.weight)
    assert back["activation"](1) == 2
    assert back["settings"] == Settings(8)
    assert back["color"] is Color.RED
    assert back["corner"] == Point(1, 2)
    assert isinstance(back["layers"]["first"][0], nn.Linear)
    assert back["lr"] == 0.1


def test_objects_are_not_unpickled_without_allow_pickle() -> None:
    packed = format.pack_hyper_parameters({"lr": 0.1, "layer": nn.Linear(1, 1), "settings": Settings(8)})
    with pytest.raises(CheckpointError, match=r"layer \(torch.*Linear\), settings .*weights_only=False") as caught:
        format.unpack_hyper_parameters(packed)
    assert "lr" not in str(caught.value).split("run code")[1].split("For a file")[0]


def test_a_users_dict_with_the_reserved_key_is_restored_unchanged() -> None:
    hparams = {"odd": {"__raylit__": "pickle", "type": "a", "data": 1}}
    assert format.unpack_hyper_parameters(format.pack_hyper_parameters(hparams), allow_pickle=True) == hparams


def test_values_that_cannot_be_pickled_are_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"'guard' \(lock\).*ignore=\['guard'\]"):
        packed = format.pack_hyper_parameters({"guard": threading.Lock(), "lr": 0.1})
    assert packed == {"lr": 0.1}


def test_the_error_names_an_object_whose_module_is_missing() -> None:
    packed = format.pack_hyper_parameters({"settings": Settings(8)})
    packed["settings"]["data"] = torch.frombuffer(bytearray(b"cno_such_module\nThing\n."), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"'settings'.*Settings.*no_such_module"):
        format.unpack_hyper_parameters(packed, allow_pickle=True)


# Random state


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), torch.rand(1).item(), np.random.rand(), np.random.normal()]


def test_generators_continue_from_their_stored_state() -> None:
    before = format.random_state()
    draws()
    np.random.normal()  # leaves a cached second value
    state = stored(format.to_plain_values(format.random_state(), "random"))
    expected = draws()
    draws()
    format.set_random_state(state)
    assert draws() == expected
    format.set_random_state(before)


@pytest.mark.filterwarnings("error")
def test_the_state_of_another_numpy_generator_is_restored() -> None:
    kept = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        state = stored(format.to_plain_values(format.random_state(), "random"))
        expected = np.random.rand()
        np.random.rand()
        format.set_random_state(state)
        assert np.random.rand() == expected
    finally:
        np.random.set_bit_generator(kept)


def test_random_state_does_not_import_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    state = format.random_state()
    assert sorted(state) == ["python", "torch"]
    assert "numpy" not in sys.modules
    format.set_random_state(state)


# Merge, progress


def rank_part(rank: int) -> Saved:
    whole = {
        "epoch": 1,
        "global_step": 20,
        "state_dict": {"weight": torch.ones(2)},
        "callbacks": {"Counter": {"count": 3}},
        "progress": Progress(epoch=1, batch=4, global_step=20).to_dict(),
    }
    return Saved(rank=rank, checkpoint=whole if rank == 0 else {}, of_rank={"random": {"seed": rank}})


def test_merge_combines_the_parts_of_ranks_and_driver() -> None:
    saved = [rank_part(2), rank_part(0), rank_part(1)]
    checkpoint = stored(format.merge(saved, {"seed": 7, "callbacks": {"EarlyStopping": {"best": np.float32(0.5)}}}))
    assert format.read_rank_states(checkpoint) == [{"random": {"seed": rank}} for rank in range(3)]
    assert checkpoint["callbacks"] == {"Counter": {"count": 3}, "EarlyStopping": {"best": 0.5}}
    assert checkpoint["raylit"]["format"] == format.FORMAT
    assert format.read_progress(checkpoint) == Progress(epoch=1, batch=4, global_step=20)
    assert format.read_seed(checkpoint) == 7
    assert not {"progress", "seed"} & checkpoint.keys()
    assert isinstance(checkpoint["raylit_version"], str)
    assert torch.equal(checkpoint["state_dict"]["weight"], torch.ones(2))


def test_the_drivers_progress_wins() -> None:
    progress = Progress(epoch=1, batch=4, global_step=20, validated_batch=4)
    checkpoint = format.merge([rank_part(0)], {"progress": progress.to_dict()})
    assert format.read_progress(checkpoint) == progress


def test_a_weights_only_checkpoint_has_no_callbacks() -> None:
    part = Saved(rank=0, checkpoint={"epoch": 0, "global_step": 5, "state_dict": {}}, of_rank={})
    checkpoint = format.merge([part], {})
    assert "callbacks" not in checkpoint
    assert format.read_progress(checkpoint).global_step == 5


def test_a_state_key_in_both_worker_and_driver_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'Counter'.*state_key"):
        format.merge([rank_part(0)], {"callbacks": {"Counter": {}}})


def test_merge_names_a_callbacks_value_that_is_not_plain() -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\['callbacks'\]\['Mine'\]\['settings'\]"):
        format.merge([rank_part(0)], {"callbacks": {"Mine": {"settings": Settings(1)}}})


def test_progress_of_lightnings_checkpoints() -> None:
    """As Lightning 2.6 writes them: by a callback inside an epoch, at its last batch, at its end; after the run."""

    def lightning(epoch: int, ready: int, processed: int, num_batches: int, *, is_last: bool) -> dict[str, Any]:
        batches = {
            "total": {"processed": 25, "completed": 24},
            "current": {"processed": num_batches, "completed": num_batches - 1},
            "is_last_batch": is_last,
        }
        epochs = {"current": {"ready": ready, "processed": processed, "completed": epoch}}
        loop = {"epoch_progress": epochs, "epoch_loop.batch_progress": batches}
        return {"epoch": epoch, "global_step": 25, "loops": {"fit_loop": loop}}

    inside = Progress(epoch=2, batch=5, batch_in_all=25, global_step=25, window=25)
    assert format.read_progress(lightning(2, 3, 2, 5, is_last=False)) == inside
    for checkpoint in (
        lightning(2, 3, 2, 10, is_last=True),
        lightning(2, 3, 3, 10, is_last=True),
        lightning(3, 3, 3, 10, is_last=True),
        lightning(2, 3, 3, 10, is_last=False),  # max_steps has ended the epoch
        {"epoch": 2, "global_step": 25},
    ):
        ended = format.read_progress(checkpoint)
        assert ended.is_epoch_ended
        assert (ended.at_next_batch().epoch, ended.at_next_batch().batch) == (3, 0)
    assert format.read_seed(lightning(2, 3, 2, 5, is_last=False)) is None


def test_unknown_fields_of_a_newer_progress_are_ignored() -> None:
    progress = {**Progress(epoch=3).to_dict(), "later": 1}
    assert format.read_progress({"raylit": {"progress": progress}}) == Progress(epoch=3)
