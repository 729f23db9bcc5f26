"""What tests of checkpoints share."""

from typing import Any

import pytest
from buckets import Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    server = Server()
    server.start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(server.bucket)
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
