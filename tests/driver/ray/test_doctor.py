"""`raylit doctor`, and errors about a cluster before it is connected to."""

import json
import platform
import re
import socket
import threading

import pytest
import ray
from hosts import run_on_two_hosts
from ray.runtime_context import get_runtime_context

from raylit.compat.ray_core import listen_on_loopback
from raylit.driver.ray import local_cluster
from raylit.driver.ray.doctor import (
    HostReport,
    check_hosts,
    check_working_dir,
    examine_cluster,
    format_diagnosis,
)
from raylit.errors import ConfigError

VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "raylit": "0.1.0"}
MACHINE = ("/dev/shm", "open files")
"""Checks that depend on the machine that runs the tests."""


def report(name, **facts):
    known = {
        "address": f"10.0.0.{name[1:]}",
        "node_id": name,
        "is_driver": name == "h0",
        "resources": {"CPU": 1.0, "GPU": 0.0, "TPU": 0.0},
        "object_store_bytes": 2**30,
        "versions": VERSIONS,
        "shm_bytes": 2**33,
        "open_files": 65536,
        "clock_offset_s": 0.0,
        "clock_error_s": 0.001,
    }
    return HostReport(host=name, **{**known, **facts})


def test_this_machine_is_examined_and_the_checkpoint_directory_left_empty(tmp_path):
    directory = tmp_path / "new" / "checkpoints"
    diagnosis = examine_cluster(num_workers=2, checkpoint_dir=str(directory))
    assert [problem for problem in diagnosis.problems if problem.check not in MACHINE] == []
    [host] = diagnosis.hosts
    assert (host.host, host.is_driver, host.checkpoint_dir) == (socket.gethostname(), True, "ok")
    assert (host.versions["python"], host.versions["ray"]) == (platform.python_version(), ray.__version__)
    assert abs(host.clock_offset_s) <= host.clock_error_s + 0.1
    assert diagnosis.workers.num_workers == 2
    assert diagnosis.workers.latency_s > 0
    assert diagnosis.workers.bytes_per_s > 0
    assert list(directory.iterdir()) == []
    assert json.loads(diagnosis.to_json())["hosts"][0]["address"] == "127.0.0.1"
    assert "2 workers (cpu) started in" in format_diagnosis(diagnosis)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    diagnosis = examine_cluster(num_workers=1, checkpoint_dir=str(tmp_path / "file" / "checkpoints"))
    [problem] = [problem for problem in diagnosis.problems if problem.check not in MACHINE]
    assert problem.check == "checkpoint directory"
    assert f"{socket.gethostname()}: it cannot be written: NotADirectoryError" in problem.found


@pytest.mark.parametrize(
    ("facts", "check", "words"),
    [
        ({"versions": {**VERSIONS, "torch": "2.12.0"}}, "versions", "torch differs .*2.13.0 on h0, h2; 2.12.0 on h1"),
        ({"versions": {**VERSIONS, "raylit": "none"}}, "versions", "raylit differs .*none on h1"),
        ({"shm_bytes": 2**26}, "/dev/shm", "it is small: h1 0.0671 GB"),
        ({"shm_bytes": 2**29}, "/dev/shm", "smaller than Ray's object store.*: h1 0.537 GB for 1.07 GB"),
        ({"open_files": 1024}, "open files", "h1 1024"),
        ({"address": "127.0.0.1"}, "network", "knows h1 by a loopback address"),
        ({"clock_offset_s": -30.0}, "clocks", r"h1 -30\.0 s"),
    ],
)
def test_a_host_that_differs_or_lacks_something_is_named(facts, check, words):
    [problem] = check_hosts([report("h0"), report("h1", **facts), report("h2")])
    assert problem.check == check
    assert re.search(words, problem.found)
    assert problem.change


def test_equal_hosts_and_hosts_of_which_little_is_known_have_no_problems():
    unknown = {"versions": {}, "shm_bytes": None, "open_files": None, "clock_offset_s": None}
    slow_answer = {"clock_offset_s": 3.0, "clock_error_s": 2.5}
    assert check_hosts([report("h0"), report("h1", **unknown), report("h2", **slow_answer)]) == []


def test_a_working_directory_over_rays_limit_is_measured_as_ray_packs_it(tmp_path):
    def make(name, num_mebibytes):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(num_mebibytes * 2**20)

    make("data/images.bin", 90)
    make(".git/pack", 300)
    make("outputs.bin", 700)
    (tmp_path / ".gitignore").write_text("outputs.bin\n")
    assert list(check_working_dir(str(tmp_path))) == []
    make("data/more.bin", 30)
    [problem] = check_working_dir(str(tmp_path))
    assert "has 120 MiB to upload, of which the largest are data 120 MiB" in problem.found
    assert "100 MiB for `ray job submit`" in problem.found
    assert ".rayignore" in problem.change


@pytest.fixture
def without_ray(monkeypatch):
    """Let `connect` believe that this process has not connected yet, without a change to the tests' node."""
    local_cluster.connect()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(local_cluster, "_ANSWER_S", 1.0)
    return monkeypatch


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", r"no Ray head answers at \S+:1 \(Connection refused.*ray start --head"),
        ("nohost.invalid:6379", r"no Ray head answers at nohost\.invalid:6379 \("),
        ("ray://127.0.0.1:1", r"no Ray head answers at 127\.0\.0\.1:1"),
        ("http://127.0.0.1:8265", r"address of a dashboard.*HOST:6379"),
        ("nonsense", "cannot read this address.*Invalid address format"),
    ],
)
def test_an_address_where_no_cluster_answers_is_an_error_soon(address, words, without_ray):
    without_ray.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=words) as raised:
        local_cluster.connect()
    assert str(raised.value).startswith(f"RAY_ADDRESS={address}")


def test_another_service_at_the_address_is_an_error(without_ray):
    def answer(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        without_ray.setenv("RAY_ADDRESS", f"127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(ConfigError, match="something other than Ray listens there"):
            local_cluster.connect()
        thread.join(timeout=10)


def test_another_version_of_ray_than_the_clusters_is_an_error_before_it_is_connected_to(without_ray):
    own = ray.__version__
    without_ray.setenv("RAY_ADDRESS", get_runtime_context().gcs_address)
    without_ray.setattr(ray, "__version__", "2.0.0")
    with (
        listen_on_loopback(),
        pytest.raises(ConfigError, match=rf"runs Ray {own} and Python \S+, this process Ray 2\.0\.0 .*'ray=={own}'"),
    ):
        local_cluster.connect()


SCRIPT = """
import sys
from raylit.cli import main
arguments = ["doctor", "--num-workers", "2", "--checkpoint-dir"]
print("CODE", main([*arguments, "/tmp/only-here"]))
print("CODE", main([*arguments, {shared!r}]))
"""


@pytest.mark.cluster
def test_a_directory_that_only_one_host_sees_is_named(tmp_path):
    output = run_on_two_hosts(SCRIPT.format(shared=str(tmp_path / "shared")), tmp_path)
    first, second = output.split("CODE 1\n")
    assert re.search(r"h0 \(driver\) +│ 10\.77\.0\.1 +│ (?!lo|\?)\S+ .*│ ok ", first)
    assert re.search(r"h1 +│ 10\.77\.0\.2 +│ (?!lo|\?)\S+ .*│ fails ", first)
    assert "only h0 sees it. h1: there is no such directory" in first
    assert "Problem 2" not in first
    assert "formed a process group in" in second
    assert "all-reduce by gloo takes" in second
    assert "No problems found." in second
    assert second.endswith("CODE 0")
