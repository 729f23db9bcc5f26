"""The examples, as a user runs them: each reaches what it promises."""

import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def run(tmp_path: pathlib.Path, name: str, *arguments: str) -> str:
    """What the example prints last."""
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=170,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout.splitlines()[-1]


def test_the_gan_makes_digits_that_a_classifier_knows(tmp_path: pathlib.Path) -> None:
    last = run(tmp_path, "gan.py", "--num-workers", "2")
    found = re.fullmatch(r"confidence: (\S+) over (\d+) digits", last)
    assert found is not None, last
    assert float(found[1]) > 0.7
    assert int(found[2]) >= 8


def test_the_gan_is_the_same_when_it_optimizes_by_hand(tmp_path: pathlib.Path) -> None:
    shape = ("--num-workers", "0", "--max-epochs", "3")
    assert run(tmp_path, "gan.py", "--manual", *shape) == run(tmp_path, "gan.py", *shape)


def test_the_character_model_learns_what_follows_what(tmp_path: pathlib.Path) -> None:
    found = re.match(r"(\S+) bits per character, of (\S+) without a model", run(tmp_path, "text_tbptt.py"))
    assert found is not None
    assert float(found[1]) < 3.5 < 6 < float(found[2])


def test_the_policy_balances_the_pole(tmp_path: pathlib.Path) -> None:
    found = re.fullmatch(r"steps balanced: (\d+) of 200", run(tmp_path, "reinforcement.py", "--num-workers", "2"))
    assert found is not None
    assert int(found[1]) > 100


def test_callbacks_watch_average_and_stop_a_training(tmp_path: pathlib.Path) -> None:
    last = run(tmp_path, "callbacks.py", "--num-workers", "2")
    found = re.fullmatch(r"test accuracy of the averaged weights: (\S+)", last)
    assert found is not None, last
    assert float(found[1]) > 0.9
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/last.ckpt"))


def test_every_worker_writes_its_predictions(tmp_path: pathlib.Path) -> None:
    found = re.fullmatch(r"accuracy: (\S+)", run(tmp_path, "predict.py", "--num-workers", "2"))
    assert found is not None
    assert float(found[1]) > 0.9
    names = sorted(path.name for path in tmp_path.glob("predictions/*"))
    assert names == ["predictions-0.pt", "predictions-1.pt"]


@pytest.mark.parametrize("options", [("--num-workers", "2"), ("--num-workers", "1", "--pbt", "--num-trials", "4")])
def test_trials_of_ones_own_trainable_find_a_learning_rate(tmp_path: pathlib.Path, options: tuple[str, ...]) -> None:
    last = run(tmp_path, "tune_own_trainable.py", *options)
    found = re.fullmatch(r"best: lr=(\S+) with a validation accuracy of (\S+)", last)
    assert found is not None, last
    assert float(found[2]) > 0.85


def test_a_finetuned_backbone_is_better_than_a_frozen_one(tmp_path: pathlib.Path) -> None:
    last = run(tmp_path, "finetune.py", "--num-workers", "2")
    found = re.fullmatch(r"accuracy: (\S+) with a frozen backbone, (\S+) finetuned", last)
    assert found is not None, last
    assert float(found[1]) + 0.05 < float(found[2])
    assert float(found[2]) > 0.85


def test_a_found_rate_and_size_train_well(tmp_path: pathlib.Path) -> None:
    found = re.fullmatch(r"accuracy: (\S+)", run(tmp_path, "find_lr.py", "--pictures", "."))
    assert found is not None
    assert float(found[1]) > 0.9
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["race.png", "range.png", "sizes.png"]


def test_a_language_model_learns_in_shards(tmp_path: pathlib.Path) -> None:
    assert run(tmp_path, "fsdp.py", "--num-workers", "2") == "the quick brown fox jumps over"
    checkpoint, *_ = tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt")
    assert sorted(part.name for part in checkpoint.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]


def test_cheaper_steps_train_to_weights_for_other_programs(tmp_path: pathlib.Path) -> None:
    last = run(tmp_path, "precision_compile.py", "--num-workers", "2", "--backend", "aot_eager")
    found = re.fullmatch(r"test accuracy: (\S+)", last)
    assert found is not None, last
    assert float(found[1]) > 0.9
    assert (tmp_path / "digits.safetensors").stat().st_size > 29_000 * 4


def test_the_best_of_a_sweep_knows_digits(tmp_path: pathlib.Path) -> None:
    last = run(tmp_path, "sweep.py")
    found = re.fullmatch(r"test accuracy: (\S+)", last)
    assert found is not None, last
    assert float(found[1]) > 0.95
