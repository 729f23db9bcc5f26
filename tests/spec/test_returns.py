"""What steps return: the loss, metrics and results, and the hooks at an epoch's end over the outputs of all workers."""

import csv
import weakref

import numpy as np
import pytest
import torch
from models import Regression, RegressionData, assert_same_weights, make_data, train_by_hand
from torch.nn import functional
from torch.utils.data import DataLoader

import raylit as pl

WORKERS = [0, 2]


def loss_of(model, batch):
    return functional.mse_loss(model(batch[0]), batch[1])


class Returning(Regression):
    """Returns from `training_step` what `wrapped` makes of the loss; logs nothing itself."""

    def __init__(self, wrapped, **kwargs):
        super().__init__(**kwargs)
        self.wrapped = wrapped

    def training_step(self, batch, batch_idx):
        return self.wrapped(loss_of(self, batch))

    def validation_step(self, batch, batch_idx):
        return None


def result_of(loss):
    result = pl.TrainResult(loss)
    result.log("train_loss", loss, prog_bar=True)
    return result


KINDS = {
    "tensor": lambda loss: loss,
    "dict": lambda loss: {"loss": loss, "log": {"train_loss": loss}, "progress_bar": {"train_loss": loss}},
    "result": result_of,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_return_trains_to_the_same_weights(kind, quiet):
    by_hand = Regression()
    model = Returning(KINDS[kind])
    model.load_state_dict(by_hand.state_dict())
    pl.seed_everything(7)
    trainer = pl.fit(model, RegressionData(), max_epochs=2, log_every_n_steps=1, **quiet)
    losses = train_by_hand(by_hand, make_data(48), batch_size=8, num_epochs=2, seed=7)
    assert_same_weights(model.state_dict(), by_hand.state_dict())
    if kind != "tensor":
        assert trainer.callback_metrics["train_loss"].item() == pytest.approx(losses[-1])
        assert trainer.logged_metrics.keys() == trainer.progress_bar_metrics.keys() == {"train_loss"}


@pytest.mark.parametrize("kind", ["dict", "result"])
def test_two_workers_train_to_the_weights_of_one_process(kind, quiet):
    by_hand = Regression()
    model = Returning(KINDS[kind])
    model.load_state_dict(by_hand.state_dict())
    pl.seed_everything(7)
    trainer = pl.fit(model, RegressionData(batch_size=4), num_workers=2, max_epochs=2, log_every_n_steps=1, **quiet)
    losses = train_by_hand(by_hand, make_data(48), batch_size=8, num_epochs=2, seed=7)
    assert_same_weights(model.state_dict(), by_hand.state_dict(), rtol=1e-4, atol=1e-6)
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx(losses[-1], rel=1e-4)


def test_none_skips_the_batch(quiet):
    class Skipping(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else loss_of(self, batch)

    class Zeroed(Regression):
        def training_step(self, batch, batch_idx):
            return loss_of(self, batch) * (0.0 if batch_idx % 2 else 1.0)

    model, zeroed = Skipping(), Zeroed()
    zeroed.load_state_dict(model.state_dict())
    for one in (model, zeroed):
        pl.seed_everything(7)
        pl.fit(one, RegressionData(), max_epochs=1, **quiet)
    assert_same_weights(model.state_dict(), zeroed.state_dict())


def test_keys_beside_the_reserved_ones_are_for_callbacks_only(quiet):
    trainer = pl.fit(
        Returning(
            lambda loss: {"loss": loss, "half": loss / 2, "names": ["a"], "many": torch.zeros(3), "hiddens": loss}
        ),
        RegressionData(),
        max_epochs=1,
        **quiet,
    )
    assert trainer.callback_metrics.keys() == {"loss", "half"}
    assert trainer.callback_metrics["half"].item() == pytest.approx(trainer.callback_metrics["loss"].item() / 2)
    assert trainer.logged_metrics == trainer.progress_bar_metrics == {}


def test_a_key_in_some_batches_of_the_log_only_is_logged(quiet):
    class Some(Regression):
        def training_step(self, batch, batch_idx):
            loss = loss_of(self, batch)
            return {"loss": loss, "x": loss} if batch_idx % 2 else {"loss": loss, "log": {"x": loss}}

    trainer = pl.fit(Some(), RegressionData(), max_epochs=1, log_every_n_steps=1, **quiet)
    assert "x" in trainer.logged_metrics


def test_what_the_module_logs_itself_comes_before_the_dict(quiet):
    class Both(Regression):
        def training_step(self, batch, batch_idx):
            loss = loss_of(self, batch)
            self.log("loss", loss.detach() * 0 + 1, on_step=False, on_epoch=True, reduce_fx="sum")
            return {"loss": loss}

    trainer = pl.fit(Both(), RegressionData(), max_epochs=1, **quiet)
    assert trainer.callback_metrics["loss"].item() == 6.0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda loss: {"log": {}}, "without a tensor under 'loss'"),
        (lambda loss: {"loss": 1.0}, "without a tensor under 'loss'"),
        (lambda loss: loss.item(), "returned a float"),
        (lambda loss: pl.EvalResult(checkpoint_on=loss), "returned an EvalResult: return a TrainResult"),
        (lambda loss: pl.TrainResult(), "nothing to minimize"),
        (lambda loss: pl.TrainResult(loss.detach()), "without a gradient"),
        (lambda loss: pl.TrainResult(loss[None].expand(2)), "must be a tensor with one element"),
    ],
)
def test_the_wrong_kind_names_the_right_one(returned, message, quiet):
    with pytest.raises(pl.ModuleError, match=message):
        pl.fit(Returning(returned), RegressionData(), max_epochs=1, **quiet)


def test_a_train_result_in_validation_names_eval_result(quiet):
    class Wrong(Regression):
        def validation_step(self, batch, batch_idx):
            with torch.inference_mode(False), torch.enable_grad():
                return pl.TrainResult(torch.ones((), requires_grad=True))

    with pytest.raises(pl.ModuleError, match="validation_step returned a TrainResult: return an EvalResult"):
        pl.fit(Wrong(), RegressionData(), max_epochs=1, **quiet)


@pytest.mark.parametrize("kind", [pl.TrainResult, pl.EvalResult])
def test_results_check_what_they_are_given(kind):
    loss = torch.ones((), requires_grad=True)
    result = kind(checkpoint_on=loss.detach())
    with pytest.raises(pl.ModuleError, match="early_stop_on"):
        kind(early_stop_on=torch.zeros(2))
    with pytest.raises(pl.ModuleError, match="must be a string"):
        result.log("checkpoint_on", loss)
    with pytest.raises(pl.ModuleError, match="sync_dist_op='median'"):
        result.log("x", loss, sync_dist_op="median")
    result.log_dict({"a": loss, "b": 2}, prog_bar=True)
    result.log("c", loss, enable_graph=True)
    assert result["b"] == 2
    assert not result["a"].requires_grad
    assert result["c"].requires_grad
    assert set(result) == {"checkpoint_on", "a", "b", "c"}
    with pytest.raises(KeyError):
        result["minimize"]


def test_results_log_as_their_arguments_say(quiet):
    class Model(Regression):
        def training_step(self, batch, batch_idx):
            result = pl.TrainResult(minimize=loss_of(self, batch))
            result.log("step", float(batch_idx))
            result.log("both", float(batch_idx), on_epoch=True)
            result.log("epoch", float(batch_idx), on_step=False, on_epoch=True, reduce_fx=torch.sum, logger=False)
            return result

        def validation_step(self, batch, batch_idx):
            result = pl.EvalResult()
            result.log_dict({"most": batch_idx, "least": batch_idx - 1.0}, reduce_fx=torch.max, prog_bar=True)
            return result

    trainer = pl.fit(Model(), RegressionData(), max_epochs=1, log_every_n_steps=1, **quiet)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics.pop("checkpoint_on") > 0
    assert metrics == {
        "step": 5.0,
        "both_step": 5.0,
        "both_epoch": 2.5,
        "both": 2.5,
        "epoch": 15.0,
        "most": 2.0,
        "least": 1.0,
    }
    assert trainer.logged_metrics.keys() == {"step", "both_step", "both_epoch", "most", "least"}
    assert trainer.progress_bar_metrics.keys() == {"most", "least"}


# The training epoch's end


class TrainingEpochEnd(Regression):
    validation_step = pl.LightningModule.validation_step

    def training_step(self, batch, batch_idx):
        return {"loss": loss_of(self, batch), "x": batch[0][:, 0], "log": {"n": len(batch[0])}}

    def training_epoch_end(self, outputs):
        self.x = torch.cat([output["x"] for output in outputs])
        self.grads = [output["loss"].requires_grad for output in outputs]
        self.log("logged_sum", float(len(self.x)), reduce_fx="sum")
        total = self.x.sum()
        return {"x_sum": total, "log": {"x_mean": total / len(self.x)}, "progress_bar": {"x_mean": total / len(self.x)}}


@pytest.mark.parametrize("num_workers", [0, 3])
def test_training_epoch_end_gets_every_sample_of_every_worker(num_workers, quiet):
    model = TrainingEpochEnd()
    loader = DataLoader(make_data(44), batch_size=12 // max(1, num_workers), shuffle=True)
    trainer = pl.fit(model, loader, num_workers=num_workers, max_epochs=2, **quiet)
    everything = make_data(44).tensors[0][:, 0]
    torch.testing.assert_close(model.x.sort().values, everything.sort().values)
    assert not any(model.grads)
    metrics = trainer.callback_metrics
    assert metrics["logged_sum"].item() == 44
    assert metrics["x_sum"].item() == pytest.approx(everything.sum().item(), abs=1e-5)
    assert trainer.progress_bar_metrics.keys() == {"x_mean"}
    assert {"x_mean", "logged_sum"} <= trainer.logged_metrics.keys()
    assert "x_sum" not in trainer.logged_metrics


def test_a_run_resumed_in_mid_epoch_has_the_outputs_of_its_first_batches(quiet, tmp_path):
    loader = DataLoader(make_data(44), batch_size=8, shuffle=True)
    save = pl.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    pl.fit(TrainingEpochEnd(), loader, max_epochs=1, callbacks=[save], **{**quiet, "enable_checkpointing": True})
    model = TrainingEpochEnd()
    pl.Trainer(max_epochs=1, **quiet).fit(model, loader, ckpt_path=tmp_path / "step=4.ckpt")
    everything = make_data(44).tensors[0][:, 0]
    torch.testing.assert_close(model.x.sort().values, everything.sort().values)


def test_training_epoch_end_gets_a_list_for_each_optimizer(quiet):
    class Two(Regression):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return {"loss": loss_of(self, batch), "index": optimizer_idx}

        def training_epoch_end(self, outputs):
            self.seen = [[output["index"] for output in one] for one in outputs]

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[index].parameters(), lr=0.1) for index in (0, 3)]

    model = Two()
    pl.fit(model, RegressionData(), max_epochs=1, **quiet)
    assert model.seen == [[0] * 6, [1] * 6]


def test_training_epoch_end_gets_a_list_of_pieces_for_each_batch(quiet):
    class Truncated(pl.LightningModule):
        truncated_bptt_steps = 2

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx, hiddens):
            hiddens = torch.zeros(()) if hiddens is None else hiddens
            result = pl.TrainResult((self.weight * batch.mean() - hiddens) ** 2, hiddens=self.weight * batch.mean())
            result.log("piece_sum", batch.mean(), on_epoch=True, tbptt_reduce_fx=torch.sum)
            result.log("piece_mean", batch.mean(), on_step=False, on_epoch=True)
            return result

        def training_epoch_end(self, outputs):
            self.pieces = [[piece["piece_mean"].item() for piece in pieces] for pieces in outputs]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = Truncated()
    data = torch.arange(12.0).reshape(2, 6)
    trainer = pl.fit(model, DataLoader(data, batch_size=1), max_epochs=1, **quiet)
    metrics = trainer.callback_metrics
    assert sorted(model.pieces) == [[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]]
    assert metrics["piece_sum"].item() == pytest.approx((7.5 + 25.5) / 2)
    assert metrics["piece_mean"].item() == pytest.approx((2.5 + 8.5) / 2)
    assert metrics["piece_sum_step"].item() in (7.5, 25.5)


# Validation and test


class PageValidation(Regression):
    """The dicts of the page."""

    def validation_step(self, batch, batch_idx):
        loss = loss_of(self, batch)
        return {"val_loss": loss, "log": {"val_loss": loss}, "progress_bar": {"val_loss": loss}, "names": ["a"]}

    def test_step(self, batch, batch_idx):
        loss = loss_of(self, batch)
        return {"test_loss": loss, "log": {"test_loss": loss, "num": len(batch[0])}}


@pytest.mark.parametrize("num_workers", WORKERS)
def test_numbers_of_a_dict_are_averaged_over_the_samples(num_workers, quiet, capsys):
    model = PageValidation()
    trainer = pl.Trainer(num_workers=num_workers, **quiet)
    (results,) = trainer.test(model, DataLoader(make_data(21), batch_size=4))
    expected = loss_of(model, make_data(21).tensors).item()
    assert results == {"test_loss": pytest.approx(expected), "num": pytest.approx((5 * 16 + 1) / 21)}
    assert "test_loss" in capsys.readouterr().out
    (results,) = trainer.validate(model, DataLoader(make_data(21), batch_size=4), verbose=False)
    assert results == {"val_loss": pytest.approx(expected)}
    assert trainer.progress_bar_metrics.keys() == trainer.logged_metrics.keys() == {"val_loss"}


class EpochEnds(Regression):
    def validation_step(self, batch, batch_idx):
        return {"loss": loss_of(self, batch), "first": batch[0][:, 0], "log": {"not_logged": 1.0}}

    def validation_epoch_end(self, outputs):
        self.first = torch.cat([output["first"] for output in outputs])
        self.log("num", float(len(self.first)), reduce_fx="sum")
        loss = torch.stack([output["loss"] for output in outputs]).mean()
        return {"val_loss": loss, "log": {"avg_val_loss": loss}}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return batch[0][:, 0], dataloader_idx

    def test_epoch_end(self, outputs):
        self.first = [torch.cat([first for first, _ in one]) for one in outputs]
        self.indices = [{index for _, index in one} for one in outputs]
        result = pl.EvalResult(checkpoint_on=torch.tensor(3.0))
        result.log("num_loaders", float(len(outputs)), reduce_fx=torch.sum)
        return result


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_epoch_ends_get_every_workers_outputs_in_data_set_order(num_workers, quiet):
    model = EpochEnds()
    trainer = pl.Trainer(num_workers=num_workers, **quiet)
    (results,) = trainer.validate(model, DataLoader(make_data(22), batch_size=4), verbose=False)
    if num_workers == 0:
        assert torch.equal(model.first, make_data(22).tensors[0][:, 0])
    by_hand = [loss_of(model, batch).item() for batch in DataLoader(make_data(22), batch_size=4)]
    mean = sum(by_hand) / len(by_hand)
    assert results == {"num": 22.0, "val_loss": pytest.approx(mean), "avg_val_loss": pytest.approx(mean)}
    assert trainer.logged_metrics.keys() == {"num", "avg_val_loss"}


def test_the_order_of_two_workers_outputs_is_that_of_the_data(quiet):
    class Ordered(EpochEnds):
        def validation_epoch_end(self, outputs):
            super().validation_epoch_end(outputs)
            self.log("in_order", float(torch.equal(self.first, make_data(22).tensors[0][:, 0])))

    (results,) = pl.Trainer(num_workers=2, **quiet).validate(
        Ordered(), DataLoader(make_data(22), batch_size=4), verbose=False
    )
    assert results["in_order"] == 1.0


def test_several_loaders_give_the_hook_a_list_for_each(quiet):
    model = EpochEnds()
    loaders = [DataLoader(make_data(8), batch_size=4), DataLoader(make_data(6), batch_size=2)]
    first, second = pl.Trainer(**quiet).test(model, loaders, verbose=False)
    assert first == {"num_loaders": 2.0, "checkpoint_on": 3.0}
    assert second == {}
    assert model.indices == [{0}, {1}]
    for seen, num in zip(model.first, (8, 6), strict=True):
        assert torch.equal(seen, make_data(num).tensors[0][:, 0])


def test_a_worker_without_a_batch_gets_the_outputs_too(quiet):
    (results,) = pl.Trainer(num_workers=3, **quiet).validate(
        EpochEnds(), DataLoader(make_data(8), batch_size=4), verbose=False
    )
    assert results["num"] == 8.0


def test_nothing_is_kept_where_the_module_defines_no_hook(quiet):
    class Output(dict):
        """Can be referred to weakly."""

    class Forgetting(Regression):
        def validation_step(self, batch, batch_idx):
            output = Output(val_loss=loss_of(self, batch))
            outputs.append(weakref.ref(output))
            num_alive.append(sum(one() is not None for one in outputs))
            return output

    outputs, num_alive = [], []
    pl.Trainer(**quiet).validate(Forgetting(), DataLoader(make_data(40), batch_size=4), verbose=False)
    assert max(num_alive) <= 2


def test_hooks_of_both_eras_run_in_their_order(quiet):
    class Both(EpochEnds):
        calls = ()

        def training_epoch_end(self, outputs):
            self.calls += ("training_epoch_end",)

        def on_train_epoch_end(self):
            self.calls += ("on_train_epoch_end",)

        def validation_epoch_end(self, outputs):
            self.calls += ("validation_epoch_end",)

        def on_validation_epoch_end(self):
            self.calls += ("on_validation_epoch_end",)

    model = Both()
    pl.fit(model, RegressionData(), max_epochs=1, num_sanity_val_steps=0, **quiet)
    assert model.calls == (
        "validation_epoch_end",
        "on_validation_epoch_end",
        "training_epoch_end",
        "on_train_epoch_end",
    )


def test_checkpoint_on_of_several_loaders_is_one_value(quiet):
    class Several(Regression):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            result = pl.EvalResult(checkpoint_on=torch.tensor(float(dataloader_idx)))
            result.log("x", 1.0)
            return result

    loaders = [DataLoader(make_data(8), batch_size=4), DataLoader(make_data(24), batch_size=4)]
    first, second = pl.Trainer(**quiet).validate(Several(), loaders, verbose=False)
    assert first == {"x/dataloader_idx_0": 1.0, "checkpoint_on": 0.75}
    assert second == {"x/dataloader_idx_1": 1.0}


def test_a_hook_that_returns_something_else_is_an_error(quiet):
    class Wrong(EpochEnds):
        def validation_epoch_end(self, outputs):
            return torch.zeros(())

    with pytest.raises(pl.ModuleError, match="validation_epoch_end returned a Tensor"):
        pl.Trainer(**quiet).validate(Wrong(), DataLoader(make_data(8), batch_size=4), verbose=False)


def test_the_sanity_check_leaves_no_metric(quiet):
    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(dict(trainer.callback_metrics))

    trainer = pl.Trainer(max_epochs=1, limit_val_batches=2, callbacks=[Look()], **quiet)
    trainer.fit(EpochEnds(), RegressionData())
    assert seen == [{}]
    assert "val_loss" in trainer.callback_metrics


# checkpoint_on, early_stop_on


class Following(Regression):
    """Validation's values are given; the training's get worse."""

    values = (3.0, 1.0, 2.0)

    def training_step(self, batch, batch_idx):
        return pl.TrainResult(loss_of(self, batch) * 0 + 10.0 - self.current_epoch)

    def validation_step(self, batch, batch_idx):
        value = torch.tensor(self.values[self.current_epoch])
        result = pl.EvalResult(checkpoint_on=value, early_stop_on=value)
        return result


def test_checkpoint_on_of_validation_decides_the_best_checkpoint():
    trainer = pl.Trainer(max_epochs=3, logger=False, enable_progress_bar=False)
    trainer.fit(Following(), RegressionData())
    assert trainer.callback_metrics["checkpoint_on"].item() == 2.0
    assert "epoch=1" in trainer.checkpoint_callback.best_model_path


def test_checkpoint_on_is_the_training_loss_by_default():
    class Training(Following):
        def training_step(self, batch, batch_idx):
            return pl.TrainResult(loss_of(self, batch) * 0 + self.values[self.current_epoch])

        validation_step = None

    trainer = pl.Trainer(max_epochs=3, logger=False, enable_progress_bar=False, limit_val_batches=0)
    trainer.fit(Training(), RegressionData())
    assert "epoch=1" in trainer.checkpoint_callback.best_model_path


def test_val_loss_counts_more_than_the_loss_that_is_checkpoint_on_by_default():
    class Logging(Following):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.values[self.current_epoch])

    trainer = pl.Trainer(max_epochs=3, logger=False, enable_progress_bar=False)
    trainer.fit(Logging(), RegressionData())
    assert "checkpoint_on" not in trainer.callback_metrics
    assert "epoch=1" in trainer.checkpoint_callback.best_model_path


def test_early_stopping_follows_early_stop_on(quiet):
    model = Following()
    model.values = (1.0, 2.0, 3.0, 4.0, 5.0)
    stop = pl.EarlyStopping("early_stop_on", patience=1)
    trainer = pl.fit(model, RegressionData(), max_epochs=5, callbacks=[stop], **quiet)
    assert trainer.current_epoch == 2


# Files of predictions


class Writing(Regression):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
        result = pl.EvalResult()
        result.write("first", batch[0][:, 0])
        result.write_dict({"row": [float(v) for v in batch[1].sum(1)], "name": ["x"] * len(batch[0])})
        result.write_dict({"array": batch[1][:, 0].numpy(), "numpy": [np.float64(1.5)] * len(batch[0])})
        result.write("other", batch[0], filename="sub/other.pt")
        return result


@pytest.mark.parametrize("num_workers", WORKERS)
def test_written_rows_stand_in_one_file_in_data_set_order(num_workers, quiet, tmp_path):
    pl.Trainer(num_workers=num_workers, **quiet).test(Writing(), DataLoader(make_data(22), batch_size=4), verbose=False)
    x, y = make_data(22).tensors
    rows = torch.load(tmp_path / "predictions.pt", weights_only=True)
    assert torch.equal(torch.stack([row["first"] for row in rows]), x[:, 0])
    assert [row["row"] for row in rows] == pytest.approx(y.sum(1).tolist())
    assert {row["name"] for row in rows} == {"x"}
    assert {row["numpy"] for row in rows} == {1.5}
    assert torch.equal(torch.stack([row["array"] for row in rows]), y[:, 0])
    other = torch.load(tmp_path / "sub" / "other.pt", weights_only=True)
    assert torch.equal(torch.stack([row["other"] for row in other]), x)


def test_rows_go_to_fsspec_urls_too(quiet):
    fsspec = pytest.importorskip("fsspec")

    class Remote(Regression):
        def test_step(self, batch, batch_idx):
            result = pl.EvalResult()
            result.write("y", batch[1][:, 0], filename="memory://raylit/rows.pt")
            return result

    pl.Trainer(**quiet).test(Remote(), DataLoader(make_data(6), batch_size=4), verbose=False)
    with fsspec.open("memory://raylit/rows.pt", "rb") as file:
        assert len(torch.load(file, weights_only=True)) == 6


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": torch.zeros(3), "b": [1]}, "1 values, but 'a' has 3"),
        ({"a": torch.zeros(())}, "one value per sample"),
        ({"a": "abc"}, "one value per sample"),
        ({"a": [object()]}, "got a object as a row"),
    ],
)
def test_columns_that_do_not_fit_are_an_error(columns, message):
    with pytest.raises(pl.ModuleError, match=message):
        pl.EvalResult().write_dict(columns)


def test_a_metric_on_step_of_evaluations_is_logged_for_each_batch(tmp_path):
    class Steps(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("first", batch[0][0, 0], on_step=True, on_epoch=True)

    logger = pl.CSVLogger(tmp_path, name="", version="run")
    trainer = pl.Trainer(max_epochs=2, logger=logger, enable_checkpointing=False, enable_progress_bar=False)
    trainer.fit(Steps(), RegressionData())
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [(int(row["step"]), float(row["first_step"])) for row in rows if row.get("first_step")]
    first = make_data(20, seed=2).tensors[0][::8, 0].tolist()
    assert [step for step, _ in steps] == list(range(6))
    assert [value for _, value in steps] == pytest.approx([*first, *first])
    assert "first_step" not in trainer.callback_metrics
