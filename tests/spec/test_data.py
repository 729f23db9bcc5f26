"""The page's Data part: loaders in fit, in the module, in a DataModule; models built from data; several loaders."""

import itertools
import os

import pytest
import torch
from models import Regression, RegressionData, assert_same_weights, make_data, train_by_hand, weights_of
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, TensorDataset, WeightedRandomSampler

import raylit as pl

WORKERS = pytest.mark.parametrize("num_workers", [0, 2])


def trainer(**arguments):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    return pl.Trainer(**{"num_workers": 0, "max_epochs": 1, **quiet, **arguments})


def numbers(start, stop, batch_size=2, **options):
    return DataLoader(TensorDataset(torch.arange(float(start), float(stop))), batch_size=batch_size, **options)


def samples(batch):
    """Numbers in a batch of `numbers`, or in each of a collection of such."""
    if isinstance(batch, dict):
        return {key: samples(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not isinstance(batch[0], torch.Tensor):
        return [samples(value) for value in batch]
    return None if batch is None else batch[0].tolist()


class Watcher(pl.LightningModule):
    """Writes the samples of every batch down, by rank, and files them, because other ranks' attributes are lost."""

    def __init__(self, path="."):
        super().__init__()
        self.path = os.path.abspath(path)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def see(self, *line):
        with open(os.path.join(self.path, f"seen-{self.global_rank}.txt"), "a") as file:
            file.write(repr(line) + "\n")

    def seen(self, loop, rank=0):
        try:
            with open(os.path.join(self.path, f"seen-{rank}.txt")) as file:
                lines = [eval(line) for line in file]
        except FileNotFoundError:
            return []
        return [line[1] if len(line) == 2 else line[1:] for line in lines if line[0] == loop]

    def training_step(self, batch, batch_idx):
        self.see("train", samples(batch))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.see("val", samples(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def flat(nested):
    return list(itertools.chain.from_iterable(nested))


class TestThreeWays:
    """Data in fit, data in the module, DataModule: the same training."""

    class InModule(Regression):
        def train_dataloader(self):
            return DataLoader(make_data(), batch_size=8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(make_data(20, seed=2), batch_size=8)

        def test_dataloader(self):
            return DataLoader(make_data(12, seed=3), batch_size=8)

    class InDataModule(pl.DataModule):
        def __init__(self): ...

        def train_dataloader(self):
            return DataLoader(make_data(), batch_size=8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(make_data(20, seed=2), batch_size=8)

        def test_dataloader(self):
            return DataLoader(make_data(12, seed=3), batch_size=8)

    def by_hand(self):
        model = Regression()
        losses = train_by_hand(model, make_data(), batch_size=8, num_epochs=2, seed=torch.initial_seed())
        x, y = make_data(20, seed=2).tensors
        x_test, y_test = make_data(12, seed=3).tensors
        with torch.no_grad():
            val_loss, test_loss = functional.mse_loss(model(x), y), functional.mse_loss(model(x_test), y_test)
        return losses, weights_of(model), val_loss.item(), test_loss.item()

    @pytest.mark.parametrize("way", ["in fit", "in fit, by keyword", "in the module", "data module", "datamodule="])
    def test_every_way_trains_validates_and_tests_as_a_hand_written_loop_does(self, way):
        torch.manual_seed(4)
        losses, weights, val_loss, test_loss = self.by_hand()
        torch.manual_seed(4)
        model = Regression() if way != "in the module" else self.InModule()
        loaders = self.InModule()
        run = trainer(max_epochs=2)
        if way == "in fit":
            run.fit(model, loaders.train_dataloader(), loaders.val_dataloader())
            (tested,) = run.test(model, loaders.test_dataloader(), verbose=False)
        elif way == "in fit, by keyword":
            run.fit(model, train_dataloaders=loaders.train_dataloader(), val_dataloaders=loaders.val_dataloader())
            (tested,) = run.test(model, dataloaders=loaders.test_dataloader(), verbose=False)
        elif way == "in the module":
            run.fit(model)
            (tested,) = run.test(model, verbose=False)
        elif way == "data module":
            run.fit(model, self.InDataModule())
            (tested,) = run.test(model, self.InDataModule(), verbose=False)
        else:
            run.fit(model, datamodule=self.InDataModule())
            (tested,) = run.test(model, datamodule=self.InDataModule(), verbose=False)
        assert model.losses == losses
        assert_same_weights(weights_of(model), weights)
        assert run.callback_metrics["val_loss"].item() == pytest.approx(val_loss)
        assert tested["test_loss"] == pytest.approx(test_loss)

    def test_two_workers_train_on_each_sample_once(self, tmp_path):
        model = Watcher(tmp_path)
        trainer(num_workers=2).fit(model, numbers(0, 23, shuffle=True), numbers(100, 109))
        assert sorted(flat(flat(model.seen("train", rank) for rank in (0, 1)))) == list(range(23))
        assert sorted(flat(flat(model.seen("val", rank) for rank in (0, 1)))) == list(range(100, 109))


class Vocabulary(pl.DataModule):
    """The page's: files are made once, every process reads them."""

    def __init__(self, path):
        super().__init__()
        self.path = str(path)
        self.train_dims = None
        self.vocab_size = 0

    def prepare_data(self):
        with open(os.path.join(self.path, f"prepared-{os.getpid()}-{len(os.listdir(self.path))}"), "w") as file:
            file.write("8")

    def setup(self):
        (name, *_) = [name for name in sorted(os.listdir(self.path)) if name.startswith("prepared")]
        with open(os.path.join(self.path, name)) as file:
            self.vocab_size = int(file.read())
        self.train, self.val = make_data(48), make_data(20, seed=2)
        self.train_dims = self.train.tensors[0].shape[1:]
        self.num_setups = getattr(self, "num_setups", 0) + 1

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=8)


class Built(Regression):
    def __init__(self, image_width, vocab_length):
        super().__init__(width=vocab_length)
        self.image_width = image_width
        self.num_setups = 0

    def on_train_start(self):
        self.num_setups = self.trainer.datamodule.num_setups


class WithStage(Vocabulary):
    def setup(self, stage=None):
        self.stages = [*getattr(self, "stages", []), stage]
        super().setup()


class TestModelsFromData:
    @WORKERS
    @pytest.mark.parametrize("kind", [Vocabulary, WithStage])
    def test_data_is_materialized_on_the_driver_and_set_up_again_in_every_process(self, kind, num_workers, tmp_path):
        dm = kind(tmp_path)
        dm.prepare_data()
        dm.setup()
        model = Built(image_width=dm.train_dims[0], vocab_length=dm.vocab_size)
        run = trainer(num_workers=num_workers, max_epochs=2)
        run.fit(model, dm)
        assert (model.image_width, model.net[0].out_features) == (8, 8)
        assert run.global_step == (12 if num_workers == 0 else 6)
        assert model.num_setups == 2, "once on the driver and once more for the run"
        assert dm.num_setups == (2 if num_workers == 0 else 1)
        assert len(os.listdir(tmp_path)) == 2, "prepare_data: by hand, and in one process of the run"

    @pytest.mark.parametrize("where", ["trainer", "data module"])
    def test_prepare_data_runs_once_in_all_where_that_is_asked_for(self, where, tmp_path):
        dm = Vocabulary(tmp_path)
        options = {"prepare_data_per_node": False} if where == "trainer" else {}
        dm.prepare_data_per_node = where == "trainer"
        trainer(num_workers=2, **options).fit(Regression(), dm)
        assert len(os.listdir(tmp_path)) == 1

    def test_a_module_prepares_its_data_too(self, tmp_path):
        class Preparing(TestThreeWays.InModule):
            def prepare_data(self):
                torch.save(make_data().tensors, tmp_path / "data.pt")

            def setup(self, stage):
                self.tensors = torch.load(tmp_path / "data.pt")

            def train_dataloader(self):
                return DataLoader(TensorDataset(*self.tensors), batch_size=8)

        trainer().fit(Preparing())

    def test_base_hooks_can_be_called_by_hand(self):
        dm = RegressionData()
        dm.prepare_data()
        pl.DataModule().setup()
        pl.DataModule().setup("fit")
        pl.DataModule().teardown()


class TestSeveralTrainingLoaders:
    def steps(self, tmp_path, loaders, *, num_workers=0, **options):
        model = Watcher(tmp_path)
        run = trainer(num_workers=num_workers, limit_val_batches=0, **options)
        run.fit(model, loaders)
        return [model.seen("train", rank) for rank in range(max(1, num_workers))], run

    @pytest.mark.parametrize(
        ("mode", "expected"),
        [
            ("min_size", [([0, 1], [10, 11]), ([2], [12, 13])]),
            ("max_size", [([0, 1], [10, 11]), ([2], [12, 13]), (None, [14])]),
            ("max_size_cycle", [([0, 1], [10, 11]), ([2], [12, 13]), ([0, 1], [14])]),
        ],
    )
    def test_a_dict_of_loaders_gives_dicts_of_batches(self, mode, expected, tmp_path):
        loaders = {"a": numbers(0, 3), "b": numbers(10, 15)}
        (steps,), run = self.steps(tmp_path, loaders, multiple_trainloader_mode=mode)
        assert steps == [{"a": a, "b": b} for a, b in expected]
        assert run.global_step == len(expected)

    def test_shorter_ones_start_anew_unless_asked_otherwise(self, tmp_path):
        (steps,), _ = self.steps(tmp_path, [numbers(0, 2), (numbers(10, 12), numbers(20, 26))])
        assert [step[0] for step in steps] == [[0, 1]] * 3
        assert [step[1][1] for step in steps] == [[20, 21], [22, 23], [24, 25]]

    def test_sequential_gives_plain_batches(self, tmp_path):
        loaders = pl.CombinedLoader([numbers(0, 3), numbers(10, 12)], "sequential")
        (steps,), _ = self.steps(tmp_path, loaders)
        assert steps == [[0, 1], [2], [10, 11]]

    def test_a_combined_loader_has_its_own_mode(self, tmp_path):
        loaders = pl.CombinedLoader({"a": numbers(0, 3), "b": numbers(10, 15)}, "min_size")
        (steps,), _ = self.steps(tmp_path, loaders, multiple_trainloader_mode="max_size")
        assert steps == [{"a": [0, 1], "b": [10, 11]}, {"a": [2], "b": [12, 13]}]

    @pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size", "sequential"])
    def test_two_workers_run_the_same_number_of_steps(self, mode, tmp_path):
        loaders = pl.CombinedLoader([numbers(0, 7, shuffle=True), numbers(10, 23, shuffle=True)], mode)
        ranks, run = self.steps(tmp_path, loaders, num_workers=2, max_epochs=2)
        num_steps = {"min_size": 2, "sequential": 2 + 4}.get(mode, 4)
        assert run.global_step == 2 * num_steps
        if mode == "sequential":
            met = sorted(flat(flat(ranks)))
            assert met == sorted([*range(7), *range(10, 23)] * 2)
        else:
            assert [len(rank) for rank in ranks] == [2 * num_steps] * 2
            met = {sample for rank in ranks for step in rank[:num_steps] for sample in step[1]}
            assert met == set(range(10, 23)) or mode == "min_size"

    @WORKERS
    def test_a_run_is_resumed_inside_an_epoch(self, num_workers, tmp_path):
        def fit(path, **options):
            path.mkdir()
            loaders = {"a": numbers(0, 5, shuffle=True), "b": numbers(10, 30, shuffle=True)}
            model = Watcher(path)
            run = trainer(num_workers=num_workers, limit_val_batches=0, max_epochs=2, **options.pop("arguments", {}))
            torch.manual_seed(3)
            run.fit(model, loaders, **options)
            return [model.seen("train", rank) for rank in range(max(1, num_workers))]

        whole = fit(tmp_path / "whole")
        saving = pl.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
        fit(tmp_path / "first", arguments={"callbacks": saving, "enable_checkpointing": True, "max_steps": 4})
        path = str(next((tmp_path / "saved").glob("*step=3*")))
        resumed = fit(tmp_path / "resumed", ckpt_path=path)
        assert resumed == [rank[3:] for rank in whole]


class Evaluated(Watcher):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.see("val", dataloader_idx, samples(batch))
        self.log("mean", batch[0].mean(), batch_size=len(batch[0]))
        self.log("shared", float(dataloader_idx), add_dataloader_idx=False, batch_size=1) if dataloader_idx == 0 else 0

    def test_step(self, batch, batch_idx, dataloader_idx):
        self.see("test", dataloader_idx, samples(batch))

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch[0] + 1000 * dataloader_idx


class TestSeveralEvaluationLoaders:
    @pytest.mark.parametrize("num_workers", [0, 3])
    @pytest.mark.parametrize("kind", ["list", "dict", "combined"])
    def test_loaders_of_very_different_lengths_and_an_empty_one(self, kind, num_workers, tmp_path):
        model = Evaluated(tmp_path)
        parts = [numbers(0, 1), numbers(10, 35), numbers(0, 0), numbers(50, 57)]
        loaders = {"list": parts, "dict": dict(enumerate(parts)), "combined": pl.CombinedLoader(parts, "sequential")}
        results = trainer(num_workers=num_workers).validate(model, loaders[kind], verbose=False)
        seen = sorted(flat(model.seen("val", rank) for rank in range(max(1, num_workers))))
        for index, expected in enumerate([[0], range(10, 35), [], range(50, 57)]):
            assert sorted(flat(part for number, part in seen if number == index)) == list(expected)
        means = {0: 0.0, 1: 22.0, 3: 53.0}
        for index, mean in means.items():
            assert results[index][f"mean/dataloader_idx_{index}"] == pytest.approx(mean)
        assert results[2] == {}
        assert results[0]["shared"] == 0.0

    @pytest.mark.parametrize("num_workers", [0, 3])
    def test_predictions_come_back_by_loader_in_order(self, num_workers, tmp_path):
        loaders = [numbers(0, 7), numbers(0, 0), numbers(10, 11)]
        outputs = trainer(num_workers=num_workers).predict(Evaluated(tmp_path), loaders)
        assert [torch.cat(parts).tolist() if parts else [] for parts in outputs] == [list(range(7)), [], [2010.0]]

    @WORKERS
    @pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
    def test_a_combined_loader_is_one_stream(self, mode, num_workers, tmp_path):
        model = Watcher(tmp_path)
        combined = pl.CombinedLoader({"a": numbers(0, 3), "b": numbers(10, 15)}, mode)
        trainer(num_workers=num_workers).validate(model, combined, verbose=False)
        steps = [model.seen("val", rank) for rank in range(max(1, num_workers))]
        last = {"min_size": [], "max_size": [(None, [14])], "max_size_cycle": [([0, 1], [14])]}[mode]
        whole = [{"a": a, "b": b} for a, b in [([0, 1], [10, 11]), ([2], [12, 13]), *last]]
        assert steps == [whole[rank :: len(steps)] for rank in range(len(steps))]

    def test_a_step_that_takes_the_loaders_number_gets_it_of_a_single_one_too(self, tmp_path):
        model = Evaluated(tmp_path)
        trainer().test(model, numbers(0, 2), verbose=False)
        assert model.seen("test") == [(0, [0.0, 1.0])]

    def test_a_step_that_does_not_take_it_runs_all_the_same(self, tmp_path):
        model = Watcher(tmp_path)
        trainer().validate(model, [numbers(0, 2), numbers(5, 6)], verbose=False)
        assert model.seen("val") == [[0, 1], [5]]

    def test_several_validation_loaders_in_fit(self, tmp_path):
        model = Evaluated(tmp_path)
        run = trainer()
        run.fit(model, numbers(0, 2), [numbers(0, 4), numbers(10, 11)])
        assert run.callback_metrics["mean/dataloader_idx_0"] == 1.5
        assert run.callback_metrics["mean/dataloader_idx_1"] == 10.0


class TestOverfitBatches:
    @pytest.mark.parametrize(("amount", "num_batches"), [(2, 2), (0.25, 3), (100, 12)])
    def test_the_same_batches_in_every_epoch_and_in_validation(self, amount, num_batches, tmp_path):
        model = Watcher(tmp_path)
        with pytest.warns(UserWarning, match="overfit_batches: the training loader shuffles"):
            trainer(max_epochs=2, overfit_batches=amount).fit(model, numbers(0, 24, shuffle=True), numbers(50, 60))
        expected = [[2 * k, 2 * k + 1] for k in range(num_batches)]
        assert model.seen("train") == expected * 2
        assert model.seen("val") == expected * 2

    def test_two_workers_validate_what_they_train(self, tmp_path):
        model = Watcher(tmp_path)
        trainer(max_epochs=2, overfit_batches=2, num_workers=2).fit(model, numbers(0, 24), numbers(50, 60))
        for loop in ("train", "val"):
            seen = [model.seen(loop, rank) for rank in (0, 1)]
            assert sorted(flat(flat(seen))) == sorted(list(range(8)) * 2)

    @pytest.mark.parametrize(
        "sampler",
        [
            lambda: WeightedRandomSampler([1.0] * 8, 8, generator=torch.Generator().manual_seed(3)),
            lambda: RandomSampler(range(8), generator=torch.Generator().manual_seed(3)),
            lambda: torch.utils.data.SubsetRandomSampler(range(8)),
        ],
    )
    @pytest.mark.filterwarnings("ignore:overfit_batches")
    def test_samplers_that_shuffle_are_replaced(self, sampler, tmp_path):
        model = Watcher(tmp_path)
        loader = numbers(0, 12, sampler=sampler())
        trainer(max_epochs=2, overfit_batches=2, limit_val_batches=0).fit(model, {"x": loader})
        assert model.seen("train") == [{"x": [0, 1]}, {"x": [2, 3]}] * 2

    def test_a_sampler_of_the_users_own_keeps_the_order_of_the_first_epoch(self, tmp_path):
        class Own(Sampler):
            def __len__(self):
                return 8

            def __iter__(self):
                yield from torch.randperm(8).tolist()

        model = Watcher(tmp_path)
        trainer(max_epochs=3, overfit_batches=2).fit(model, numbers(0, 8, sampler=Own()), numbers(0, 8))
        first = model.seen("train")[:2]
        assert model.seen("train") == first * 3
        assert model.seen("val") == first * 3


class Growing(Watcher):
    """Its loaders have one more batch in every epoch that they are made for."""

    def train_dataloader(self):
        self.see("made", "train", self.current_epoch)
        return numbers(0, 4 * (self.current_epoch + 1))

    def val_dataloader(self):
        self.see("made", "val", self.current_epoch)
        return numbers(0, 4 * (self.current_epoch + 1))


class TestReload:
    @WORKERS
    @pytest.mark.parametrize("every", [0, 1, 2])
    def test_hooks_make_new_loaders_every_n_epochs(self, every, num_workers, tmp_path):
        model = Growing(tmp_path)
        run = trainer(num_workers=num_workers, max_epochs=4, reload_dataloaders_every_n_epochs=every)
        run.fit(model)
        made = [0] if every == 0 else list(range(0, 4, every))
        world_size = max(1, num_workers)
        for rank in range(world_size):
            assert model.seen("made", rank) == [(name, epoch) for epoch in made for name in ("train", "val")]
            sizes = [max(e for e in made if e <= epoch) + 1 for epoch in range(4)]
            assert len(model.seen("train", rank)) == len(model.seen("val", rank)) == 2 // world_size * sum(sizes)

    def test_the_validation_interval_follows_the_new_size(self, tmp_path):
        model = Growing(tmp_path)
        trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1, val_check_interval=0.5).fit(model)
        assert len(model.seen("val")) == 2 * (2 + 4 + 6)

    def test_loaders_that_were_given_stay(self, tmp_path):
        model = Growing(tmp_path)
        trainer(max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(model, numbers(0, 2), numbers(0, 2))
        assert model.seen("made") == []
        assert len(model.seen("train")) == 3

    def test_ranks_that_split_at_random_split_alike(self, tmp_path):
        class Splitting(Watcher):
            def train_dataloader(self):
                part, _ = torch.utils.data.random_split(TensorDataset(torch.arange(20.0)), [8, 12])
                return DataLoader(part, batch_size=2)

        model = Splitting(tmp_path)
        trainer(num_workers=2, max_epochs=3, limit_val_batches=0, reload_dataloaders_every_n_epochs=1).fit(model)
        ranks = [model.seen("train", rank) for rank in (0, 1)]
        epochs = [flat(ranks[0][2 * e : 2 * e + 2] + ranks[1][2 * e : 2 * e + 2]) for e in range(3)]
        assert [len(set(epoch)) for epoch in epochs] == [8, 8, 8]
        assert set(epochs[0]) != set(epochs[1]) != set(epochs[2])

    def test_a_resumed_run_reloads_where_the_uninterrupted_one_does(self, tmp_path):
        saving = pl.ModelCheckpoint(dirpath=tmp_path / "saved", filename="{epoch}", save_top_k=-1)
        arguments = {"reload_dataloaders_every_n_epochs": 2, "callbacks": saving, "enable_checkpointing": True}
        trainer(max_epochs=2, **arguments).fit(Growing(tmp_path))
        os.remove(tmp_path / "seen-0.txt")
        model, path = Growing(tmp_path), next((tmp_path / "saved").glob("epoch=0*"))
        trainer(max_epochs=5, reload_dataloaders_every_n_epochs=2).fit(model, ckpt_path=path)
        assert [epoch for name, epoch in model.seen("made") if name == "train"] == [0, 2, 4]


class Iterable(IterableDataset):
    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __iter__(self):
        yield from ((torch.tensor(float(number)),) for number in range(self.num_samples))


class Sized(Iterable):
    def __len__(self):
        return self.num_samples


class OddFirst(Sampler):
    def __len__(self):
        return 10

    def __iter__(self):
        return iter([*range(1, 10, 2), *range(0, 10, 2)])


class Own:
    """A loader that is no DataLoader."""

    def __iter__(self):
        for start in range(0, 10, 2):
            yield [torch.arange(start, start + 2.0)]


KINDS = {
    "iterable data set": lambda: DataLoader(Iterable(10), batch_size=2),
    "iterable data set with a length": lambda: DataLoader(Sized(10), batch_size=2),
    "sampler": lambda: numbers(0, 10, sampler=OddFirst()),
    "batch sampler": lambda: DataLoader(
        TensorDataset(torch.arange(10.0)), batch_sampler=[[0], [1, 2, 3], [4, 5], [6, 7, 8, 9]]
    ),
    "list of batches": lambda: [[torch.arange(start, start + 2.0)] for start in range(0, 10, 2)],
    "own loader": Own,
    "worker processes": lambda: numbers(0, 10, num_workers=1),
}


class TestAnyLoader:
    @WORKERS
    @pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
    def test_every_sample_is_trained_and_validated_once_an_epoch(self, make, num_workers, tmp_path):
        model = Watcher(tmp_path)
        trainer(num_workers=num_workers, max_epochs=2).fit(model, make(), make())
        for loop in ("train", "val"):
            seen = flat(flat(model.seen(loop, rank) for rank in range(max(1, num_workers))))
            assert sorted(seen) == sorted(list(range(10)) * 2)

    def test_a_generator_is_trained_on_once(self, tmp_path):
        model = Watcher(tmp_path)
        trainer(limit_val_batches=0).fit(model, ([torch.tensor([number])] for number in range(5)))
        assert model.seen("train") == [[number] for number in range(5)]

    def test_validation_runs_where_an_iterable_ends_before_its_length(self, tmp_path):
        class Short(Iterable):
            def __len__(self):
                return 30

        model = Watcher(tmp_path)
        trainer().fit(model, DataLoader(Short(10), batch_size=2), numbers(0, 2))
        assert len(model.seen("train")) == 5
        assert model.seen("val") == [[0, 1]]


class Stateful:
    """Batches of numbers that it draws from a generator of its own; knows where it stands."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)
        self.num_given = 0
        self.num_fetched = 0
        self.is_resumed = False

    def __iter__(self):
        self.num_given = self.num_given % 8 if self.is_resumed else 0
        self.is_resumed = False
        while self.num_given < 8:
            self.num_given += 1
            self.num_fetched += 1
            yield [torch.rand(2, generator=self.generator)]

    def __len__(self):
        return 8

    def state_dict(self):
        return {"generator": self.generator.get_state(), "num_given": self.num_given}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])
        self.num_given = state["num_given"]
        self.is_resumed = True


def torchdata_loader():
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    dataset = TensorDataset(torch.arange(16.0))
    return torchdata.StatefulDataLoader(dataset, batch_size=1, shuffle=True)


class TestStatefulLoaders:
    @WORKERS
    @pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
    @pytest.mark.parametrize("make", [Stateful, torchdata_loader])
    @pytest.mark.parametrize("step", [3, 4, 6])
    def test_a_resumed_run_goes_on_from_the_loaders_state(self, make, step, num_workers, tmp_path):
        def fit(name, **arguments):
            (tmp_path / name).mkdir()
            model, loader = Watcher(tmp_path / name), make()
            torch.manual_seed(3)
            path = arguments.pop("ckpt_path", None)
            run = trainer(num_workers=num_workers, limit_val_batches=0, max_epochs=2, **arguments)
            run.fit(model, loader, ckpt_path=path)
            return [model.seen("train", rank) for rank in range(max(1, num_workers))], loader

        whole, _ = fit("whole")
        saving = pl.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=step, save_top_k=-1)
        fit("first", callbacks=saving, enable_checkpointing=True, max_steps=step)
        path = str(next((tmp_path / "saved").glob(f"*step={step}*")))
        resumed, loader = fit("resumed", ckpt_path=path)
        assert resumed == [rank[step:] for rank in whole]
        if num_workers == 0 and make is Stateful:
            assert loader.num_fetched == 16 - step, "nothing is fetched to be thrown away"


class OfModule(Watcher):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.see("before", dataloader_idx, samples(batch))
        return [batch[0] + 100]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.see("transfer", dataloader_idx, str(device))
        return super().transfer_batch_to_device([batch[0] * 2], device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.see("after", dataloader_idx, samples(batch))
        return [batch[0] + 0.5]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.see("val", samples(batch))

    def test_step(self, batch, batch_idx):
        self.see("test", samples(batch))

    def predict_step(self, batch, batch_idx):
        return batch[0]


class TestTransferHooks:
    def test_they_run_in_every_loop(self, tmp_path):
        model = OfModule(tmp_path)
        run = trainer()
        run.fit(model, numbers(0, 1), [numbers(1, 2), numbers(2, 3)])
        run.test(model, numbers(3, 4), verbose=False)
        assert torch.cat(run.predict(model, numbers(4, 5))).tolist() == [208.5]
        assert model.seen("before") == [(0, [0]), (0, [1]), (1, [2]), (0, [3]), (0, [4])]
        assert model.seen("transfer") == [(0, "cpu"), (0, "cpu"), (1, "cpu"), (0, "cpu"), (0, "cpu")]
        assert [part for _, part in model.seen("after")] == [[200], [202], [204], [206], [208]]
        assert model.seen("train") + model.seen("val") + model.seen("test") == [[200.5], [202.5], [204.5], [206.5]]

    def test_the_data_modules_win(self, tmp_path):
        class Data(pl.DataModule):
            def train_dataloader(self):
                return numbers(0, 1)

            def val_dataloader(self):
                return numbers(0, 1)

            def on_before_batch_transfer(self, batch, dataloader_idx):
                return [batch[0] + 7]

            def on_after_batch_transfer(self, batch, dataloader_idx):
                return batch

        model = OfModule(tmp_path)
        with pytest.warns(UserWarning, match=r"on_\w+_batch_transfer is overridden in OfModule and in Data"):
            trainer().fit(model, Data())
        assert model.seen("train") == [[14]], "its own transfer hook is the module's"

    def test_a_transfer_hook_of_lightning_09_takes_no_index(self, tmp_path):
        class Old(Watcher):
            def transfer_batch_to_device(self, batch, device):
                return [batch[0] + 3]

        model = Old(tmp_path)
        trainer(limit_val_batches=0).fit(model, numbers(0, 1))
        assert model.seen("train") == [[3]]

    def test_a_rank_without_a_share_calls_none(self, tmp_path):
        model = OfModule(tmp_path)
        trainer(num_workers=2, limit_val_batches=0).fit(model, numbers(0, 3, batch_size=1))
        assert [len(model.seen("before", rank)) for rank in (0, 1)] == [2, 1]

    def test_they_see_the_batch_in_the_runs_precision(self, tmp_path):
        class Typed(Watcher):
            def on_before_batch_transfer(self, batch, dataloader_idx):
                self.see("type", str(batch[0].dtype))
                return batch

        model = Typed(tmp_path)
        trainer(limit_val_batches=0, precision=64).fit(model, numbers(0, 1))
        assert model.seen("type") == ["torch.float64"]
