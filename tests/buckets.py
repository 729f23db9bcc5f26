"""A store of objects on loopback, which outlives its server's stops."""

import warnings

import pytest


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

    @property
    def environment(self) -> dict[str, str]:
        """By which a process finds it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None
