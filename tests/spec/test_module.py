"""Step 1 of the page, the LightningModule: it defines loops, system and optimizer, and stays a pure PyTorch module."""

import copy
import dataclasses
import io
import pickle
import time
from argparse import Namespace

import fsspec
import pytest
import torch
from models import Regression, RegressionData, assert_same_weights, make_data, weights_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import raylit as pl


class LitModel(pl.LightningModule):
    """The page's own."""

    def __init__(self):
        super().__init__()
        self.l1 = torch.nn.Linear(8 * 8, 10)

    def forward(self, x):
        return torch.relu(self.l1(x.view(x.size(0), -1)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = functional.cross_entropy(y_hat, y)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.0005)


X = torch.randn(4, 8, 8)


def images(num_samples=64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_samples, 8, 8, generator=generator)
    return torch.utils.data.TensorDataset(x, x[:, 0, 0].gt(0).long())


def test_the_page_model_is_used_like_any_pytorch_module(quiet):
    model = LitModel()
    pl.Trainer(max_epochs=1, **quiet).fit(model, DataLoader(images(), batch_size=16))
    model.eval()
    y_hat = model(X)
    assert y_hat.shape == (4, 10)
    assert not model.training
    assert set(dict(model.named_parameters())) == {"l1.weight", "l1.bias"}
    model.apply(lambda child: nn.init.zeros_(child.weight) if isinstance(child, nn.Linear) else None)
    assert model.l1.weight.abs().sum() == 0
    assert model.to(torch.float64).dtype == torch.float64
    assert model.double().half().float().dtype == torch.float32


@pytest.mark.parametrize("copying", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies_are_equal_before_during_and_after_a_run(copying, quiet):
    def copy_of(model):
        if copying == "deepcopy":
            return copy.deepcopy(model)
        if copying == "pickle":
            return pickle.loads(pickle.dumps(model))
        buffer = io.BytesIO()
        if copying == "torch.save":
            torch.save(model, buffer)
            buffer.seek(0)
            return torch.load(buffer, weights_only=False)
        other = Regression()
        other.load_state_dict(model.state_dict())
        return other

    class Copies(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            self.copy = copy_of(pl_module)

    def check(model, other):
        assert_same_weights(weights_of(model), weights_of(other))
        x = torch.randn(4, 8)
        assert torch.equal(model(x), other(x))
        with pytest.raises(RuntimeError, match="not inside a run"):
            _ = other.trainer

    model, callback = Regression(), Copies()
    check(model, copy_of(model))
    pl.fit(model, RegressionData(), max_epochs=1, callbacks=callback, **quiet)
    check(model, callback.copy)
    check(model, copy_of(model))


class Tied(Regression):
    def __init__(self):
        super().__init__(width=8)
        self.net[3] = nn.Linear(8, 8)
        self.net[3].weight = self.net[0].weight

    def training_step(self, batch, batch_idx):
        return self(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx): ...


class Buffers(Regression):
    def __init__(self):
        super().__init__()
        self.register_buffer("num_seen", torch.tensor(0))
        self.register_buffer("last", torch.zeros(1), persistent=False)

    def training_step(self, batch, batch_idx):
        self.num_seen += len(batch[0])
        self.last.fill_(float(batch_idx))
        return super().training_step(batch, batch_idx)


class Lazy(Regression):
    def __init__(self):
        super().__init__()
        self.net[0] = nn.LazyLinear(16)


class Grows(Regression):
    def __init__(self):
        super().__init__()
        self.in_setup = self.in_configure = None

    def setup(self, stage):
        self.in_setup = nn.Linear(8, 8)

    def configure_model(self):
        if self.in_configure is None:
            self.in_configure = nn.Linear(8, 8)

    def forward(self, x):
        return self.net(self.in_configure(self.in_setup(x)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_tied_weights_stay_tied(num_workers, quiet):
    model = Tied()
    before = weights_of(model)
    pl.fit(model, RegressionData(), num_workers=num_workers, max_epochs=1, limit_val_batches=0, **quiet)
    assert model.net[3].weight is model.net[0].weight
    assert not torch.equal(model.net[0].weight, before["net.0.weight"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_buffers_come_back_whether_or_not_they_are_part_of_the_state(num_workers, quiet):
    model = Buffers()
    pl.fit(model, RegressionData(), num_workers=num_workers, max_epochs=1, **quiet)
    assert (model.num_seen, model.last) == (48, torch.tensor([5.0]))
    assert "last" not in model.state_dict()


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_lazy_layers_take_their_shape_in_the_run(num_workers, quiet):
    model = Lazy()
    pl.fit(model, RegressionData(), num_workers=num_workers, max_epochs=1, **quiet)
    assert model.net[0].weight.shape == (16, 8)
    assert model(torch.randn(2, 8)).shape == (2, 3)
    assert type(model.net[0]) is nn.Linear


@pytest.mark.parametrize("num_workers", [0, 2])
def test_layers_added_in_setup_and_configure_model_are_trained_and_come_back(num_workers, quiet):
    model = Grows()
    pl.fit(model, RegressionData(batch_size=4), num_workers=num_workers, max_epochs=1, **quiet)
    assert {"in_setup.weight", "in_configure.weight"} <= set(model.state_dict())
    assert model(torch.randn(2, 8)).shape == (2, 3)


class Net(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


class Compiles(Regression):
    """Counts the graphs that the backend below has compiled in the worker."""

    def training_step(self, batch, batch_idx):
        self.num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_compiled_module_trains_compiled_and_has_the_weights_afterwards(num_workers, quiet):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, plain = Compiles(), Compiles()
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="eager")
    data = RegressionData()
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=1, limit_val_batches=0, **quiet)
    trainer.fit(compiled, data)
    assert model.num_graphs > 0
    assert model._compiled_call_impl is None
    assert trainer.lightning_module is model
    pl.fit(plain, data, max_epochs=1, limit_val_batches=0, **quiet)
    assert_same_weights(weights_of(plain), weights_of(model))
    x = torch.randn(2, 8)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_layers_compiled_in_place_are_compiled_in_the_workers_too(num_workers, quiet):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Compiles()
    model.net = Net(*model.net)
    model.net.compile(backend="eager")
    pl.fit(model, RegressionData(), num_workers=num_workers, max_epochs=1, limit_val_batches=0, **quiet)
    assert model.num_graphs > 0
    assert model.net._compiled_call_impl is not None


class Config(pl.LightningModule):
    """Its hyper-parameters come as one object."""

    def __init__(self, config, scale=1.0):
        super().__init__()
        self.save_hyperparameters(config)
        self.layer = nn.Linear(8, config.width)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


@dataclasses.dataclass
class Settings:
    width: int = 3
    lr: float = 0.1


class Typed(Config):
    def __init__(self, config: Settings):
        super().__init__(config)
        self.is_typed = isinstance(config, Settings)


def trained_checkpoint(model):
    trainer = pl.Trainer(
        max_epochs=1, limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False, logger=False
    )
    trainer.fit(model, DataLoader(make_data(16), batch_size=8))
    return trainer.checkpoint_callback.best_model_path


@pytest.mark.parametrize("config", [Settings(), Namespace(width=3, lr=0.1)])
def test_hyperparameters_in_one_object_rebuild_the_module(config):
    model = Config(config)
    assert model.hparams == {"width": 3, "lr": 0.1}
    loaded = Config.load_from_checkpoint(trained_checkpoint(model))
    assert loaded.hparams == model.hparams
    assert_same_weights(weights_of(loaded), weights_of(model))


def test_a_constructor_that_names_its_type_gets_that_type():
    loaded = Typed.load_from_checkpoint(trained_checkpoint(Typed(Settings(width=5))))
    assert loaded.is_typed
    assert loaded.layer.out_features == 5


class Selected(Regression):
    def __init__(self, width=4, lr=0.1, secret="x", **kwargs):
        super().__init__(width=width, lr=lr)
        self._hparams = None
        self.save_hyperparameters(ignore="secret")


def test_hyperparameters_may_be_named_or_left_out():
    assert Selected(extra=[1]).hparams == {"width": 4, "lr": 0.1, "extra": [1]}

    class Named(Regression):
        def __init__(self, width, lr, layers):
            super().__init__()
            self._hparams = None
            self.save_hyperparameters("width", "layers")

    model = Named(3, 0.5, [1, 2])
    assert model.hparams == {"width": 3, "layers": [1, 2]}
    model.hparams.layers.append(3)
    model.hparams.width = 9
    assert model.hparams_initial == {"width": 3, "layers": [1, 2]}


def test_hyperparameters_of_a_data_module():
    class Data(RegressionData):
        def __init__(self, batch_size=4, names=("a",)):
            self.save_hyperparameters()
            super().__init__(batch_size=batch_size)

    data = Data(names=["b"])
    trainer = pl.Trainer(max_epochs=1, enable_progress_bar=False, enable_model_summary=False, logger=False)
    trainer.fit(Regression(), data)
    assert data.hparams == data.hparams_initial == {"batch_size": 4, "names": ["b"]}
    path = trainer.checkpoint_callback.best_model_path
    assert Data.load_from_checkpoint(path, batch_size=2).hparams == {"batch_size": 2, "names": ["b"]}
    assert Regression.load_from_checkpoint(path).hparams.width == 16


def test_load_from_checkpoint_takes_overrides_files_devices_and_lenience(tmp_path):
    path = trained_checkpoint(Regression(width=6))
    assert Regression.load_from_checkpoint(path, lr=9.0).hparams == {
        "width": 6,
        "dropout": 0.0,
        "lr": 9.0,
        "optimizer": "sgd",
    }
    yaml, csv = tmp_path / "hparams.yaml", tmp_path / "hparams.csv"
    yaml.write_text("width: 6\nlr: 0.25\n")
    csv.write_text("key,value\nwidth,6\nlr,0.125\n")
    assert Regression.load_from_checkpoint(path, hparams_file=yaml).hparams.lr == 0.25
    assert Regression.load_from_checkpoint(path, hparams_file=csv).hparams.lr == 0.125
    with pytest.raises(pl.CheckpointError, match="there is no such file"):
        Regression.load_from_checkpoint(path, hparams_file=tmp_path / "missing.yaml")
    assert Regression.load_from_checkpoint(path, map_location="meta").device.type == "meta"

    class Larger(Regression):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.more = nn.Linear(1, 1)

    with pytest.raises(pl.CheckpointError, match=r"missing more\.weight, more\.bias"):
        Larger.load_from_checkpoint(path)
    assert Larger.load_from_checkpoint(path, strict=False).net[0].out_features == 6


def test_load_from_checkpoint_reads_urls(tmp_path):
    model = Regression()
    path = trained_checkpoint(model)
    with open(path, "rb") as file, fsspec.open("memory://runs/best.ckpt", "wb") as remote:
        remote.write(file.read())
    loaded = Regression.load_from_checkpoint("memory://runs/best.ckpt")
    assert_same_weights(weights_of(loaded), weights_of(model))
    with pytest.raises(pl.CheckpointError, match=r"cannot read the checkpoint memory://runs/other.ckpt: FileNotFound"):
        Regression.load_from_checkpoint("memory://runs/other.ckpt")


def test_freeze_and_unfreeze():
    model = Regression()
    model.freeze()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.unfreeze()
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


class WithExample(Regression):
    def __init__(self):
        super().__init__(dropout=0.5)
        self.frozen = nn.Linear(10, 100).requires_grad_(False)
        self.example_input_array = torch.zeros(5, 8)


def test_summaries_count_parameters_to_a_depth():
    model = WithExample()
    summary = model.summarize()
    assert [(layer.name, layer.kind, layer.num_parameters) for layer in summary.layers] == [
        ("net", "Sequential", 195),
        ("frozen", "Linear", 1100),
    ]
    assert (summary.num_trainable, summary.num_frozen, summary.num_parameters) == (195, 1100, 1295)
    assert summary.size_bytes == 4 * 1295
    assert (summary.layers[0].in_size, summary.layers[0].out_size) == ([5, 8], [5, 3])
    assert [layer.name for layer in model.summarize(mode="full").layers][:2] == ["net", "net.0"]
    assert len(model.summarize(max_depth=2).layers) == 6
    assert model.summarize(max_depth=0).layers == ()
    assert model.training


@pytest.mark.parametrize("num_workers", [0, 1])
def test_fit_prints_the_summary_once(num_workers, quiet, capfd):
    class Late(WithExample):
        def configure_model(self):
            self.late = nn.Linear(1, 1000)

    pl.fit(Late(), RegressionData(), num_workers=num_workers, max_epochs=2, **{**quiet, "enable_model_summary": True})
    printed = capfd.readouterr().out
    assert printed.count("trainable parameters") == 2
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert [row.replace("│", " ").split()[1:3] for row in rows] == [
        ["net", "Sequential"],
        ["frozen", "Linear"],
        ["late", "Linear"],
    ]
    assert "2.2 K      trainable parameters" in printed
    assert "1.1 K      non-trainable parameters" in printed
    assert "3.3 K      parameters in all" in printed
    assert "[5, 8]" in rows[0]


@pytest.mark.parametrize(("argument", "num_rows"), [("top", 1), ("full", 5), (None, 0)])
def test_weights_summary_says_how_much(argument, num_rows, capfd):
    trainer = pl.Trainer(weights_summary=argument, max_epochs=0, logger=False, enable_progress_bar=False)
    trainer.fit(Regression(), RegressionData())
    printed = capfd.readouterr().out
    assert sum(line.startswith("│") for line in printed.splitlines()) == num_rows
    assert ("trainable parameters" in printed) == (num_rows > 0)


def test_to_onnx_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(pl.ConfigError, match="has no example_input_array"):
        Regression().to_onnx(tmp_path / "model.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(pl.RaylitError, match=r"pip install onnx onnxscript"):
        WithExample().to_onnx(tmp_path / "model.onnx")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["script", "trace"])
def test_to_torchscript_gives_the_same_numbers_without_raylit(method, tmp_path):
    model = WithExample()
    scripted = model.to_torchscript(tmp_path / "model.pt", method=method)
    x = torch.randn(5, 8)
    assert model.training
    expected = model.eval()(x)
    assert torch.equal(scripted(x), expected)
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(x), expected)


class Looks(Regression):
    """What a module sees of the run."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def on_train_epoch_end(self):
        self.seen[self.current_epoch] = (self.global_step, str(self.device), self.on_gpu, self.trainer.max_epochs)
        self.print("epoch", self.current_epoch)

    def on_train_start(self):
        rank = torch.tensor([float(self.global_rank)], requires_grad=True)
        everyone = self.all_gather(rank, sync_grads=True)
        everyone.sum().backward()
        self.gathered = self.all_gather({"rank": rank.detach(), "numbers": [self.global_rank]})
        self.gradient = rank.grad.item()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_module_sees_the_run_in_its_hooks(num_workers, quiet, capfd):
    model = Looks()
    pl.fit(model, RegressionData(batch_size=4), num_workers=num_workers, max_epochs=2, **quiet)
    world_size = max(1, num_workers)
    steps = 12 // world_size
    assert model.seen == {0: (steps, "cpu", False, 2), 1: (2 * steps, "cpu", False, 2)}
    assert capfd.readouterr().out.count("epoch 1") == 1
    assert (model.current_epoch, model.global_step) == (0, 0)
    if num_workers:
        assert model.gathered["rank"].tolist() == [[0.0], [1.0]]
        assert model.gathered["numbers"][0].tolist() == [0, 1]
    else:
        assert model.gathered == {"rank": torch.tensor([0.0]), "numbers": [0]}
    assert model.gradient == world_size


class Shows(Regression):
    def training_step(self, batch, batch_idx):
        time.sleep(0.03)
        loss = super().training_step(batch, batch_idx)
        self.log("shown", loss, prog_bar=True)
        return loss

    def get_progress_bar_dict(self):
        items = super().get_progress_bar_dict()
        return {**items, "squared": torch.tensor(items["shown"]) ** 2, "note": f"{self.current_epoch}!"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_get_progress_bar_dict_may_add_to_the_bar(num_workers, quiet):
    trainer = pl.fit(Shows(), RegressionData(), num_workers=num_workers, max_epochs=2, **quiet)
    shown = trainer.progress_bar_metrics
    assert {"shown", "val_loss"} <= shown.keys()
    assert shown["note"] == "1!"
    assert shown["squared"] >= 0.0
