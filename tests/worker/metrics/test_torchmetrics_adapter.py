"""torchmetrics: objects given to self.log over batches, workers and checkpoints; raylit.metrics."""

import itertools
import sys

import pytest
import torch
from models import Regression, make_data
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl
from raylit.worker.metrics import torchmetrics_adapter

torchmetrics = pytest.importorskip("torchmetrics")
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision  # noqa: E402
from torchmetrics.wrappers import MultioutputWrapper, Running  # noqa: E402


def make_scores(num=22):
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(num, 8, generator=generator)
    return TensorDataset(scores, torch.randint(0, 3, (num,), generator=generator))


def binary(batch):
    return batch[0][:, 0].sigmoid(), (batch[1] > 0).long()


class Measured(Regression):
    """Evaluates scores that are the data themselves, so that metrics do not depend on the model."""

    def __init__(self):
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=3, average="micro")
        self.auroc = BinaryAUROC()  # keeps lists of all it has seen
        self.correlation = torchmetrics.PearsonCorrCoef()  # its states are merged by its own formula
        self.largest = torchmetrics.MaxMetric()
        self.mean = torchmetrics.MeanMetric()
        self.together = torchmetrics.MetricCollection(
            {"f1": MulticlassF1Score(num_classes=3), "precision": MulticlassPrecision(num_classes=3)}
        )
        self.outputs = MultioutputWrapper(torchmetrics.MeanSquaredError(), num_outputs=1)
        self.counts = []

    def test_step(self, batch, batch_idx):
        scores, classes = batch
        self.accuracy(scores[:, :3], classes)
        self.auroc.update(*binary(batch))
        self.correlation.update(scores[:, 0], scores[:, 1] + scores[:, 0])
        self.largest.update(scores)
        self.mean.update(scores[:, 0])
        self.together.update(scores[:, :3], classes)
        self.outputs.update(scores[:, :1], scores[:, 1:2])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log("auroc", self.auroc)
        self.log("correlation", self.correlation)
        self.log("largest", self.largest)
        self.log("mean", self.mean)
        self.log("sum", self.mean + self.largest)
        self.log("outputs", self.outputs)
        self.log_dict(self.together)

    validation_step = test_step

    def on_test_epoch_end(self):
        self.counts.append(self.accuracy.update_count)

    def on_test_end(self):
        parts = [self.accuracy, self.auroc, self.correlation, self.largest, self.mean, *self.together.values()]
        self.log_failed = any(part.update_count for part in [*parts, *self.outputs.metrics])


def expected():
    scores, classes = make_scores().tensors
    whole = Measured()
    values = {
        "accuracy_epoch": whole.accuracy(scores[:, :3], classes),
        "auroc": whole.auroc(*binary((scores, classes))),
        "correlation": whole.correlation(scores[:, 0], scores[:, 1] + scores[:, 0]),
        "largest": scores.max(),
        "mean": scores[:, 0].mean(),
        "sum": scores.max() + scores[:, 0].mean(),
        "outputs": ((scores[:, 0] - scores[:, 1]) ** 2).mean(),
        **whole.together(scores[:, :3], classes),
    }
    return {name: pytest.approx(value.item(), abs=1e-5) for name, value in values.items()}


@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 4), (2, 4), (3, 4), (3, 11)])
def test_objects_equal_the_value_over_the_whole_data_set(num_workers, batch_size, quiet):
    """Three workers and two batches: one of them has none."""
    model = Measured()
    trainer = pl.Trainer(num_workers=num_workers, **quiet)
    loader = DataLoader(make_scores(), batch_size=batch_size)
    for _ in range(2):
        (results,) = trainer.test(model, loader, verbose=False)
        assert results == expected()
    assert trainer.callback_metrics["accuracy"].item() == expected()["accuracy_epoch"]
    assert not model.log_failed


def test_the_value_of_each_batch_is_logged_on_step(quiet, tmp_path):
    logger = pl.CSVLogger(tmp_path, name="", version="run")
    trainer = pl.Trainer(**{**quiet, "logger": logger})
    trainer.test(Measured(), DataLoader(make_scores(), batch_size=11), verbose=False)
    text = (tmp_path / "run" / "metrics.csv").read_text()
    assert "accuracy_step" in text
    accuracy = MulticlassAccuracy(num_classes=3, average="micro")
    for scores, classes in DataLoader(make_scores(), batch_size=11):
        assert f"{accuracy(scores[:, :3], classes).item():.5f}"[:6] in text


class Trained(Regression):
    """Counts the samples that it is trained on."""

    validation_step = pl.LightningModule.validation_step

    def __init__(self):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()
        self.by_hand = torchmetrics.SumMetric()

    def training_step(self, batch, batch_idx):
        self.mean.update(batch[0][:, 0])
        self.by_hand.update(batch[0][:, 0])
        self.log("train_mean", self.mean, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.log("by_hand", self.by_hand.compute())
        self.by_hand.reset()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_metrics_are_exact_with_uneven_batches(num_workers, quiet):
    loader = DataLoader(make_data(22), batch_size=4, shuffle=True)
    model = Trained()
    trainer = pl.fit(model, loader, num_workers=num_workers, max_epochs=2, **quiet)
    first = make_data(22).tensors[0][:, 0]
    assert trainer.callback_metrics["train_mean"].item() == pytest.approx(first.mean().item(), abs=1e-6)
    assert trainer.callback_metrics["by_hand"].item() == pytest.approx(first.sum().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("num_workers", "every", "num_then"), [(0, 3, 0), (0, 6, 0), (2, 2, 2), (2, 2, 0), (2, 3, 0), (0, 2, 2)]
)
def test_a_run_resumed_inside_an_epoch_continues_the_states(num_workers, every, num_then, quiet, tmp_path):
    """After the epoch's sixth and last batch no further one comes that would log the name again."""
    loader = DataLoader(make_data(22), batch_size=4, shuffle=True)
    save = pl.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    quiet = {**quiet, "enable_checkpointing": True}
    pl.fit(Trained(), loader, num_workers=num_workers, max_epochs=1, callbacks=[save], **quiet)
    trainer = pl.Trainer(num_workers=num_then, max_epochs=1, **{**quiet, "enable_checkpointing": False})
    trainer.fit(Trained(), loader, ckpt_path=tmp_path / f"step={every}.ckpt")
    first = make_data(22).tensors[0][:, 0]
    assert trainer.callback_metrics["train_mean"].item() == pytest.approx(first.mean().item(), abs=1e-6)
    assert trainer.callback_metrics["by_hand"].item() == pytest.approx(first.sum().item(), abs=1e-5)


def test_loading_names_metrics_whose_states_cannot_be_merged():
    class Correlated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pearson, self.auroc = torchmetrics.PearsonCorrCoef(), BinaryAUROC()

    ranked = []
    for rank, num_updates in enumerate((1, 3)):
        module = Correlated()
        for number in range(num_updates):
            values = torch.tensor([0.1, 0.4, 0.2]) * (number + 1 + rank)
            module.pearson.update(values, values.square())
            module.auroc.update(values / 9, torch.tensor([0, 1, 1]))
        ranked.append(torchmetrics_adapter.copy_module_states(module))
    merged = Correlated()
    assert torchmetrics_adapter.load_merged_states(merged, ranked) == ["pearson"]
    assert (merged.pearson.update_count, merged.auroc.update_count) == (3, 4)
    assert len(merged.auroc.preds) == 4


class Manual(Trained):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_a_rank_that_steps_with_another_ranks_batch_does_not_measure_it(quiet):
    """The last sample is the only one of the third global batch."""
    loader = DataLoader(make_data(25), batch_size=4, shuffle=True)
    trainer = pl.fit(Manual(), loader, num_workers=3, max_epochs=1, **quiet)
    first = make_data(25).tensors[0][:, 0]
    assert trainer.callback_metrics["by_hand"].item() == pytest.approx(first.sum().item(), abs=1e-5)
    assert trainer.callback_metrics["train_mean"].item() == pytest.approx(first.mean().item(), abs=1e-6)


def test_an_object_whose_value_is_not_one_number_is_an_error(quiet):
    class Matrix(Regression):
        def __init__(self):
            super().__init__()
            self.matrix = torchmetrics.classification.MulticlassConfusionMatrix(num_classes=3)

        def test_step(self, batch, batch_idx):
            self.matrix.update(batch[0][:, :3], batch[1])
            self.log("matrix", self.matrix)

    with pytest.raises(pl.ConfigError, match=r"MulticlassConfusionMatrix.*tensor of shape \(3, 3\)"):
        pl.Trainer(**quiet).test(Matrix(), DataLoader(make_scores(), batch_size=4), verbose=False)


class Order(torchmetrics.Metric):
    """The last of all rows, and the mean over all updates, as digits of one number."""

    def __init__(self):
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("level", default=torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, rows):
        self.rows.append(rows)
        self.level = self.level + (len(rows) - self.level) / self.update_count

    def compute(self):
        return 1000 * torchmetrics.utilities.dim_zero_cat(self.rows)[-1] + self.level


@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("hook", ["test_step", "on_test_epoch_end", "test_epoch_end"])
def test_states_are_merged_in_data_set_order_wherever_the_object_is_logged(num_workers, hook, quiet):
    class Ordered(Regression):
        def __init__(self):
            super().__init__()
            self.order = Order()

        def test_step(self, batch, batch_idx):
            self.order.update(batch[0][:, 0])
            if hook == "test_step":
                self.log("order", self.order)

    def log(self, *args):
        self.log("order", self.order)

    if hook != "test_step":
        setattr(Ordered, hook, log)
    (results,) = pl.Trainer(num_workers=num_workers, **quiet).test(
        Ordered(), DataLoader(make_scores(18), batch_size=4), verbose=False
    )
    last = make_scores(18).tensors[0][-1, 0].item()
    assert results["order"] == pytest.approx(1000 * last + 18 / 5, abs=1e-3)


def test_running_means_are_merged(quiet):
    class Window(Regression):
        def __init__(self):
            super().__init__()
            self.sum = Running(torchmetrics.SumMetric(), window=100)

        def test_step(self, batch, batch_idx):
            self.sum.update(batch[0][:, 0])
            self.log("sum", self.sum)

    (results,) = pl.Trainer(num_workers=2, **quiet).test(
        Window(), DataLoader(make_scores(), batch_size=4), verbose=False
    )
    assert results["sum"] == pytest.approx(make_scores().tensors[0][:, 0].sum().item(), abs=1e-5)


class Shared(Regression):
    """One object, and one collection, for everything: they see 100 in training, and 3 or 13 in evaluations."""

    def __init__(self, where="step", has_own_names=False):
        super().__init__()
        self.mean = torchmetrics.MeanMetric()
        self.both = torchmetrics.MetricCollection({"low": torchmetrics.MinMetric(), "high": torchmetrics.MaxMetric()})
        self.best = torchmetrics.MaxMetric()  # of the user's own: over all validations
        self.where, self.has_own_names, self.seen_best = where, has_own_names, []

    def measure(self, stage, values, index=0):
        name = f"{stage}{index}" if self.has_own_names else stage
        if values is not None:
            self.mean.update(values)
            self.both.update(values)
        if (values is None) == (self.where == "hook"):
            arguments = {"on_step": False, "on_epoch": True, "add_dataloader_idx": not self.has_own_names}
            self.log(f"{name}_mean", self.mean, **arguments)
            self.log(f"{name}_again", self.mean, **arguments)
            if not self.has_own_names:
                self.both.prefix = f"{name}_"
                self.log_dict(self.both, **arguments)

    def training_step(self, batch, batch_idx):
        self.measure("train", batch[0][:, 0])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.measure("val", batch[0][:, 0], dataloader_idx)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.measure("test", batch[0][:, 0], dataloader_idx)

    def on_train_epoch_end(self):
        self.measure("train", None)

    def on_test_epoch_end(self):
        self.measure("test", None)

    def on_validation_epoch_end(self):
        self.measure("val", None)
        self.best.update(float(self.trainer.current_epoch))
        self.seen_best.append(self.best.update_count)


def constant(value, num):
    return DataLoader(TensorDataset(torch.full((num, 8), value), torch.zeros(num, 3)), batch_size=2)


def alike(stage, value):
    return {f"{stage}_{name}": value for name in ("mean", "again", "low", "high")}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("where", "num_sanity_val_steps"), [("step", 0), ("hook", 0), ("hook", 2)])
def test_an_object_shared_by_training_and_evaluation_has_separate_values(
    where, num_sanity_val_steps, num_workers, quiet
):
    """Two validations in each epoch; a worker has no batch of the second fit's."""
    model = Shared(where)
    trainer = pl.Trainer(
        num_workers=num_workers,
        max_epochs=2,
        val_check_interval=0.5,
        num_sanity_val_steps=num_sanity_val_steps,
        **quiet,
    )
    training = constant(100.0, 8 * max(1, num_workers))
    for value, num_samples in ((3.0, 7), (13.0, 2)):
        trainer.fit(model, training, constant(value, num_samples))
        metrics = {name: metric.item() for name, metric in trainer.callback_metrics.items() if name != "train_loss"}
        assert metrics == {**alike("train", 100.0), **alike("val", value)}
        # What only the hooks at a validation's end update goes on from one to the next.
        assert [after - before for before, after in itertools.pairwise(model.seen_best[-4:])] == [1, 1, 1]
    for stage, value in (("val", 3.0), ("test", 13.0), ("val", 13.0)):
        evaluate = trainer.validate if stage == "val" else trainer.test
        assert evaluate(model, constant(value, 5), verbose=False) == [alike(stage, value)]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("has_own_names", [False, True])
def test_an_object_shared_by_several_loaders_has_a_value_per_loader(has_own_names, num_workers, quiet):
    """A worker has no batch of the second loader's."""
    model = Shared(has_own_names=has_own_names)
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=1, limit_train_batches=2, **quiet)
    loaders = [constant(3.0, 7), constant(13.0, 2), constant(5.0, 4)]
    trainer.fit(model, constant(100.0, 8), loaders)
    fitted = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    results = trainer.validate(model, loaders, verbose=False)
    for index, value in enumerate((3.0, 13.0, 5.0)):
        names = ("mean", "again") if has_own_names else ("mean", "again", "low", "high")
        named = "val{1}_{0}" if has_own_names else "val_{0}/dataloader_idx_{1}"
        expected = {named.format(name, index): value for name in names}
        assert expected.items() <= results[index].items()
        assert expected.items() <= fitted.items()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_object_logged_under_one_name_is_computed_over_all_loaders(num_workers, quiet):
    class Whole(Regression):
        def __init__(self):
            super().__init__()
            self.order, self.own = Order(), torch.nn.ModuleList(torchmetrics.SumMetric() for _ in range(2))

        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.order.update(batch[0][:, 0])
            self.own[dataloader_idx].update(batch[0][:, 0])
            self.log("order", self.order, add_dataloader_idx=False)
            self.log("own", self.own[dataloader_idx])

        def on_validation_epoch_end(self):
            self.sums = [metric.compute().item() for metric in self.own]

    loaders = [constant(3.0, 8), constant(5.0, 8)]
    model = Whole()
    results = pl.Trainer(num_workers=num_workers, **quiet).validate(model, loaders, verbose=False)
    assert results[0] == {"order": 5002.0, "own/dataloader_idx_0": 24.0}
    assert results[1] == {"own/dataloader_idx_1": 40.0}
    assert model.sums == [24.0, 40.0]


def test_one_object_under_two_alternating_names_is_an_error_that_names_both(quiet):
    class Turns(Regression):
        def __init__(self):
            super().__init__()
            self.mean = torchmetrics.MeanMetric()

        def training_step(self, batch, batch_idx):
            self.mean.update(batch[0])
            self.log("odd" if batch_idx % 2 else "even", self.mean, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

    with pytest.raises(pl.ConfigError, match=r"self\.log\('even'\) and self\.log\('odd'\).*MeanMetric.*clone"):
        pl.fit(Turns(), constant(1.0, 8), constant(1.0, 8), max_epochs=1, **quiet)


def test_an_object_is_reset_after_a_failed_run(quiet):
    class Failing(Shared):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and self.fails_in == "training":
                raise RuntimeError("as asked")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if self.fails_in == "validation":
                raise RuntimeError("as asked")

    model = Failing()
    for fails_in in ("training", "validation"):
        model.fails_in = fails_in
        with pytest.raises(RuntimeError, match="as asked"):
            pl.fit(model, constant(100.0, 8), constant(50.0, 4), max_epochs=1, num_sanity_val_steps=0, **quiet)
    model.fails_in = None
    trainer = pl.fit(model, constant(3.0, 8), constant(13.0, 4), max_epochs=1, num_sanity_val_steps=0, **quiet)
    assert trainer.callback_metrics["train_mean"].item() == 3.0
    assert trainer.callback_metrics["val_mean"].item() == 13.0


# raylit.metrics


@pytest.mark.parametrize(
    ("preds", "target", "value"),
    [
        (torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 1]), 0.5),
        (torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]), 0.75),
        (torch.tensor([0.9, 0.1, 0.8]), torch.tensor([1, 0, 0]), 2 / 3),
        (torch.tensor([[0.9, 0.1], [0.8, 0.9]]), torch.tensor([[1, 0], [0, 1]]), 0.75),
    ],
)
def test_accuracy_needs_no_task(preds, target, value):
    from raylit.metrics.functional import accuracy

    assert accuracy(preds, target).item() == pytest.approx(value)
    assert pl.metrics.functional.accuracy(preds, target).item() == pytest.approx(value)


def test_metric_classes_infer_the_task_from_their_arguments():
    assert type(pl.metrics.Accuracy(num_classes=3)) is MulticlassAccuracy
    assert type(pl.metrics.Accuracy("binary")).__name__ == "BinaryAccuracy"
    assert type(pl.metrics.F1Score(num_labels=3)).__name__ == "MultilabelF1Score"
    assert pl.metrics.MeanSquaredError is torchmetrics.MeanSquaredError
    with pytest.raises(pl.ConfigError, match="num_classes"):
        pl.metrics.Accuracy()
    with pytest.raises(AttributeError, match="no 'Nonsense'"):
        pl.metrics.Nonsense  # noqa: B018


def test_mismatched_shapes_are_an_error():
    with pytest.raises(pl.ConfigError, match=r"\(2, 3, 4\).*\(2,\)"):
        pl.metrics.functional.accuracy(torch.zeros(2, 3, 4), torch.zeros(2))


def test_a_missing_torchmetrics_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'raylit\[metrics\]'"):
        from raylit.metrics.functional import accuracy  # noqa: F401
