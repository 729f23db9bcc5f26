"""Sharded checkpoints in a bucket, to which each worker brings its part."""

import os
from typing import Any

import pytest
import torch
from buckets import Server
from models import assert_same_weights, weights_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

import raylit as pl
from raylit.checkpoint import files
from raylit.checkpoint.index import find_newest_usable, read_index
from raylit.driver.loop import checkpoint_queue
from raylit.storage import file_system, list_names


class Shared(pl.LightningModule):
    """Its workers find the bucket, and give it up soon."""

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__()
        self.environment = environment

    def setup(self, stage: str) -> None:
        import s3fs

        os.environ.update(self.environment)
        s3fs.S3FileSystem.retries = 1
        s3fs.S3FileSystem.clear_instance_cache()

    def configure_model(self) -> None:
        self.net = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch[:, None].float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class Outage(pl.DriverCallback):
    """The server is away when step 4 is saved."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def next_pause_step(self, run: Any) -> int:
        return int(run.state.progress.global_step) + 1

    def on_train_pause(self, run: Any) -> None:
        run.finish_saves()
        if run.state.progress.global_step == 4:
            self.server.stop()
        if run.state.progress.global_step == 5:
            self.server.start()


def test_an_unreachable_bucket_costs_one_checkpoint_and_no_training(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_queue, "_RETRY_AFTER_S", (0.01,))
    saving = pl.ModelCheckpoint(
        server.url, "{step}", every_n_train_steps=2, save_last=True, enable_version_counter=False
    )
    model = Shared(server.environment)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(num_workers=2, strategy="fsdp", max_epochs=1, callbacks=[Outage(server), saving], **quiet)
    with pytest.warns(UserWarning, match=r"cannot .*/step=4\.ckpt.*next save is tried again.*/step=2\.ckpt") as caught:
        trainer.fit(model, DataLoader(list(range(12))))
    assert len([one for one in caught if "next save" in str(one.message)]) == 1
    assert trainer.global_step == 6
    assert sorted(list_names(server.url)) == [".index.json", "last.ckpt", "step=6.ckpt"]
    assert [entry.step for entry in read_index(server.url).entries] == [6, 6]
    for name in ("last.ckpt", "step=6.ckpt"):
        assert_same_weights(files.read(f"{server.url}/{name}")["state_dict"], weights_of(model), rtol=0, atol=0)
        [index, parts] = sorted(list_names(f"{server.url}/{name}"))
        assert index == "index.ckpt"
        assert sorted(list_names(f"{server.url}/{name}/{parts}")) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    store, place = file_system(f"{server.url}/step=6.ckpt/{parts}/__1_0.distcp")
    store.pipe_file(place, store.cat_file(place)[:-1])
    with pytest.warns(UserWarning, match=r"step=6.ckpt is damaged: __1_0.distcp has"):
        found = find_newest_usable(server.url, is_whole=False)
    assert found is not None
    assert found[0].endswith("last.ckpt")


SCRIPT = """
import os, sys
os.environ.update({environment!r})
sys.path[:0] = [{tests!r}, {strategies!r}]
from test_fsdp_strategy import *

def run(num_workers, **arguments):
    model = Deep(optimizer="AdamW")
    callbacks = [pl.ModelCheckpoint({url!r}, every_n_train_steps=2, save_top_k=2, monitor="loss", save_last=True)]
    trainer = fit(model, num_workers=num_workers, callbacks=callbacks, log_every_n_steps=1, **arguments)
    print("AT", trainer.global_step)
    return model, callbacks[0]

_, saving = run(2, max_epochs=1)
again = [run(3, resume="auto"), run(3, ckpt_path="last", max_epochs=3)]
assert_same_weights(files.read(saving.last_model_path)["state_dict"], weights_of(again[-1][0]), rtol=0, atol=0)
from raylit.cli import main
print("DONE", main(["checkpoint", "consolidate", saving.last_model_path, "one.ckpt"]))
assert_same_weights(torch.load("one.ckpt", weights_only=True)["state_dict"], weights_of(again[-1][0]), rtol=0, atol=0)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_another_number_of_workers_downloads_the_parts_it_needs(server: Server, run_script: Any) -> None:
    tests = os.path.dirname(os.path.dirname(__file__))
    places = {"tests": tests, "strategies": os.path.join(tests, "strategies", "fsdp")}
    output = run_script(SCRIPT.format(environment=server.environment, url=server.url, **places), timeout_s=150)
    assert output.count("AT ") == 3
    assert "DONE 0" in output
    assert len([name for name in list_names(server.url) if name.endswith(".ckpt")]) == 3
