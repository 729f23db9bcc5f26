"""A bucket whose server goes away in the middle of a run, and comes back."""

import threading
import warnings
from typing import Any

import pytest
from models import Regression, RegressionData

import raylit as pl
from raylit.checkpoint import files, index
from raylit.driver import saves


class Server:
    """Speaks S3 on loopback, always on the same port; what its buckets hold outlives a stop."""

    def __init__(self) -> None:
        for package in ("s3fs", "boto3"):
            pytest.importorskip(package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._module = pytest.importorskip("moto.server")
        self._server, self.port = None, 0

    def start(self) -> None:
        self._server = self._module.ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    @property
    def bucket(self) -> str:
        return f"bucket-{self.port}"

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/run"

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = Server()
    server.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(server.bucket)
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


class Outage(pl.Callback):
    """The server is away from one step to another, or for a time."""

    def __init__(self, server: Server, first: int, *, last: int = 0, duration_s: float = 0.0) -> None:
        self.server, self.first, self.last, self.duration_s = server, first, last, duration_s

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.first:
            self.server.stop()
            if self.duration_s:
                threading.Timer(self.duration_s, self.server.start).start()
        if trainer.global_step == self.last:
            self.server.start()


def trained(saving: pl.ModelCheckpoint, outage: Outage) -> pl.Trainer:
    trainer = pl.Trainer(
        num_workers=0,
        max_epochs=2,
        callbacks=[saving, outage],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Regression(), RegressionData())
    return trainer


def test_a_bucket_that_goes_away_is_told_once_and_written_to_when_it_is_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saves, "_RETRY_AFTER_S", (0.01, 0.01))
    saving = pl.ModelCheckpoint(server.url, "{step}", every_n_train_steps=2)
    # The save of step 4 is on its way or has ended when the server goes.
    told = r"cannot .* the checkpoint s3://.*/step=[46]\.ckpt: .*next save is tried again.*/step=[24]\.ckpt"
    with pytest.warns(UserWarning, match=told) as caught:
        trainer = trained(saving, Outage(server, 5, last=9))
    assert len([one for one in caught if "next save" in str(one.message)]) == 1
    assert trainer.global_step == 12
    found = index.newest_usable(server.url)
    assert found is not None
    assert found[0] == saving.newest_model_path == f"{server.url}/step=12.ckpt"
    assert found[1]["global_step"] == 12


def test_a_bucket_that_is_soon_back_is_no_news(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saves, "_RETRY_AFTER_S", (0.1,) * 100)
    saving = pl.ModelCheckpoint(
        server.url, "{step}", every_n_train_steps=4, save_top_k=-1, enable_version_counter=False
    )
    trained(saving, Outage(server, 4, duration_s=0.7))
    assert [entry.step for entry in index.read_index(server.url).entries] == [4, 8, 12]
    assert files.read(f"{server.url}/step=4.ckpt")["global_step"] == 4
