"""Each profiler in runs of one process."""

import json
import pstats

import pytest
import torch
from models import Regression, RegressionData, fit
from torch.profiler import schedule

import raylit as pl
from raylit.profilers import Profiler, SimpleProfiler


def actions_of(profile):
    return {action.name: action for action in profile.actions}


class Allocating(Regression):
    def on_train_start(self):
        self.ballast = torch.ones(self.num_bytes // 4)
        self.ballast = None


class Named(Regression):
    def training_step(self, batch, batch_idx):
        with self.trainer.profiler.profile("my part"):
            scale_of(batch)
        return super().training_step(batch, batch_idx)


def scale_of(batch):
    return batch[0].abs().sum()


def test_peak_memory_grows_with_what_hooks_allocate():
    peaks = []
    for num_bytes in (4, 400 * 2**20):
        model = Allocating()
        model.num_bytes = num_bytes
        [worker, _] = fit(model, profiler="simple", max_epochs=1).profiler.profiles
        peaks.append(dict(worker.peak_memory_bytes)["resident"])
    assert peaks[1] - peaks[0] > 350 * 2**20


def test_the_table_is_written_to_the_configured_file(tmp_path, capsys):
    fit(Regression(), profiler=pl.SimpleProfiler(dirpath=tmp_path / "new", filename="times"), max_epochs=1)
    assert "training_step" not in capsys.readouterr().out
    assert "training_step" in (tmp_path / "new" / "fit-times.txt").read_text(encoding="utf-8")


def test_the_table_goes_to_stdout_by_default(capsys):
    fit(Regression(), profiler="simple", max_epochs=1)
    out = capsys.readouterr().out
    assert "Profile of fit" in out
    assert "Peak memory" in out


def test_advanced_shows_the_users_functions_in_their_action(capsys):
    trainer = fit(Named(), profiler="advanced", max_epochs=1)
    [worker, _] = trainer.profiler.profiles
    sections = {section.split()[0]: section for section in worker.text.split("\n\n")}
    assert "scale_of (profilers/test_profilers.py:" in worker.text
    assert "forward (tests/models.py:" in sections["training_step"]
    assert "scale_of" not in sections["training_step"]  # which is time of "my part"
    assert actions_of(worker)["training_step"].num_calls == 6
    assert "6 │" in next(line for line in sections["training_step"].splitlines() if "forward (tests/models.py" in line)


def test_advanced_limits_its_lines_and_dumps_what_pstats_reads(tmp_path):
    profiler = pl.AdvancedProfiler(dirpath=tmp_path, filename="deep", line_count_restriction=2, dump_stats=True)
    fit(Regression(), profiler=profiler, max_epochs=1)
    [worker, _] = profiler.profiles
    section = next(section for section in worker.text.split("\n\n") if section.startswith("training_step"))
    assert sum(line.startswith("│") for line in section.splitlines()) == 2
    stats = pstats.Stats(str(tmp_path / "fit-deep-rank0-training_step.prof"))
    assert any(name == "training_step" for _, _, name in stats.stats)


def test_cprofile_is_disabled_after_a_failure():
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            raise KeyError("no such thing")

    with pytest.raises(KeyError):
        fit(Failing(), profiler="advanced", max_epochs=1)
    fit(Regression(), profiler="advanced", max_epochs=1)  # cProfile refuses to run twice at a time, in later Pythons


def test_pytorch_writes_a_trace_with_actions_operators_and_modules(tmp_path):
    # All rows: which are the twenty that take longest depends on the machine.
    profiler = pl.PyTorchProfiler(dirpath=tmp_path, filename="ops", row_limit=-1)
    trainer = fit(Named(), profiler=profiler, max_epochs=1)
    trace = json.loads((tmp_path / "fit-ops-rank0.pt.trace.json").read_text(encoding="utf-8"))
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    names = [event["name"] for event in events]
    assert {"training_step", "my part", "backward", "optimizer_step", "Linear: net.0", "aten::addmm"} <= set(names)
    assert names.count("training_step") == 3  # the schedule's: of six batches one waits, one warms up
    assert all(event["dur"] >= 0 and event["ts"] > 0 for event in events)
    [worker, _] = trainer.profiler.profiles
    assert "aten::addmm" in worker.text
    assert actions_of(worker)["training_step"].num_calls == 6


def test_pytorch_follows_the_users_schedule(tmp_path):
    every_other = schedule(wait=0, warmup=1, active=1, repeat=2)
    seen = []
    profiler = pl.PyTorchProfiler(dirpath=tmp_path, schedule=every_other, on_trace_ready=seen.append)
    fit(Regression(), profiler=profiler, max_epochs=1)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "fit-profile-rank0-0.pt.trace.json",
        "fit-profile-rank0-1.pt.trace.json",
    ]
    assert len(seen) == 2


def test_pytorch_says_so_when_a_run_is_too_short(tmp_path):
    profiler = pl.PyTorchProfiler(dirpath=tmp_path)
    fit(Regression(), profiler=profiler, max_epochs=1, limit_train_batches=1)
    assert "too few batches" in profiler.profiles[0].text
    assert list(tmp_path.glob("*.json")) == []


def test_pytorch_leaves_no_hooks_on_the_module():
    model = Regression()
    fit(model, profiler="pytorch", max_epochs=1)
    assert all(not child._forward_hooks and not child._forward_pre_hooks for child in model.modules())


def test_a_custom_profiler_receives_the_actions():
    class Own(Profiler):
        def setup(self, stage, local_rank=None, log_dir=None):
            self.started = []

        def start(self, action_name):
            self.started.append(action_name)

        def stop(self, action_name): ...

        def summary(self):
            return f"{self.started.count('backward')} backward passes"

    profiler = Own()
    fit(Regression(), profiler=profiler, max_epochs=1)
    assert profiler.profiles[0].text == "6 backward passes"


@pytest.mark.parametrize("name", ["simple", "advanced", "pytorch"])
def test_profiling_does_not_change_results(name):
    plain, profiled = Regression(dropout=0.5), Regression(dropout=0.5)
    profiled.load_state_dict(plain.state_dict())
    fit(plain)
    fit(profiled, profiler=name)
    assert plain.losses == profiled.losses


@pytest.mark.parametrize("profiler", [None, False, pl.PassThroughProfiler()])
def test_profile_in_a_hook_works_without_a_profiler(profiler):
    trainer = fit(Named(), profiler=profiler, max_epochs=1)
    assert type(trainer.profiler) is pl.PassThroughProfiler
    assert trainer.profiler.profiles == ()


def test_test_and_predict_are_profiled_too():
    data = RegressionData()
    trainer = pl.Trainer(num_workers=0, logger=False, enable_progress_bar=False, profiler="simple")
    trainer.test(Regression(), datamodule=data, verbose=False)
    assert actions_of(trainer.profiler.profiles[0])["test_step"].num_calls == 3
    trainer.predict(Regression(), datamodule=data)
    assert actions_of(trainer.profiler.profiles[0])["predict_step"].num_calls == 3


def test_a_profilers_file_name_does_not_lead_out_of_its_directory(tmp_path):
    with pytest.raises(pl.ConfigError, match=r"SimpleProfiler\(filename='\.\./\.\./x'\) leads out of the directory"):
        SimpleProfiler(tmp_path, "../../x")
