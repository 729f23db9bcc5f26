"""Private names of Ray's core and its sessions, tested with the real Ray, without a node where possible.

Whole runs inside functions of Ray Train and Ray Tune are in tests/driver.
"""

import pickle
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import ray
from ray._private import services
from ray.exceptions import ActorDiedError
from ray.train._internal import session as sessions
from ray.train.v2._internal.execution import context, train_fn_utils

from raylit.compat import ray_core
from raylit.compat.private_names import import_private
from raylit.driver.ray import local_cluster
from raylit.errors import RaylitError


@pytest.fixture
def _node():
    local_cluster.connect()


def test_a_missing_name_is_an_error_that_says_which_version_has_it():
    message = rf"training needs ray\._private\.worker\.gone.*ray {ray.__version__} .*pip install 'ray==2\.60\.\*'"
    with pytest.raises(RaylitError, match=message):
        import_private("ray._private.worker", "gone", feature="training")
    with pytest.raises(RaylitError, match=r"ray\.gone\.name, a private name"):
        import_private("ray.gone", "name", feature="training")


def test_settings_are_read_anew(monkeypatch):
    with monkeypatch.context() as context:
        context.setenv("RAY_AUTH_MODE", "disabled")
        ray_core.reload_settings()
    ray_core.reload_settings()  # a node of an earlier test may need its token


def test_the_address_of_a_node_is_the_loopback_s_within_the_context_only():
    own = services.get_node_ip_address()
    with ray_core.listen_on_loopback():
        assert services.get_node_ip_address() == "127.0.0.1"
    assert services.get_node_ip_address() == own


@pytest.mark.usefixtures("_node")
def test_a_cluster_with_this_processs_versions_has_no_mismatch():
    assert ray_core.find_version_mismatch(ray.get_runtime_context().gcs_address) is None


def test_ray_is_silent_on_the_deaths_of_these_workers_and_keeps_the_users_filter(monkeypatch):
    deduplicator = ray._private.ray_logging.stdout_deduplicator
    monkeypatch.setattr(deduplicator, "skip_re", None)
    line = "A worker died or was killed while executing a task. Worker ID: abc Node ID: def"
    ray_core.hide_worker_deaths(["xyz", "abc"])
    assert deduplicator.skip_re.search(line)
    assert not deduplicator.skip_re.search(line.replace("abc", "other"))
    ray_core.hide_worker_deaths(["more"])
    assert deduplicator.skip_re.search(line)


def test_without_the_filter_ray_prints_its_lines(monkeypatch):
    monkeypatch.delattr(ray._private.ray_logging, "stdout_deduplicator")
    ray_core.hide_worker_deaths(["abc"])


@pytest.mark.usefixtures("_node")
def test_the_head_says_that_nothing_adds_nodes_and_nothing_waits():
    assert ray_core.read_autoscaling() is None
    assert ray_core.read_autoscaler_limits() is None
    assert ray_core.list_pending_groups() == frozenset()
    assert ray_core.list_pending_requests() == []


@pytest.mark.usefixtures("_node")
def test_what_is_free_in_a_group_is_told_for_each_bundle():
    group = ray.util.placement_group([{"CPU": 0.5}, {"CPU": 0.25}])
    try:
        assert group.wait(30)
        deadline = time.monotonic() + 30
        while not (free := ray_core.read_free_in_group(group.id.hex())) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert free == {0: {"CPU": 0.5}, 1: {"CPU": 0.25}}
    finally:
        ray.util.remove_placement_group(group)


def test_the_node_is_ended_with_ray_s_shutdown(monkeypatch):
    ended = []
    node = types.SimpleNamespace(kill_all_processes=lambda check_alive: ended.append(check_alive))
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append("shutdown"))
    ray_core.shut_down_at_once()
    assert ended == ["shutdown", False]
    assert ray._private.worker._global_node is None


def test_internal_resources_are_left_out():
    resources = {"CPU": 2.0, "memory": 1e9, "object_store_memory": 1e9, "node:10.0.0.1": 1.0, "CPU_group_0_ab": 1.0}
    assert ray_core.select_plain_resources(resources) == {"CPU": 2.0}


def test_an_actor_s_death_is_read_from_its_text():
    death = ActorDiedError()
    death.error_msg = (
        "The actor is dead because its worker process has died. ip: 10.0.0.1, it exits with an exit code 4"
    )
    text = str(pickle.loads(pickle.dumps(death)))
    assert ray_core.parse_exit_code(text) == 4
    assert ray_core.parse_host_address(text) == "10.0.0.1"
    assert ray_core.strip_preamble(text).startswith("its worker process has died")
    assert not ray_core.is_memory_monitor_kill(text)
    assert not ray_core.is_connection_lost(text)
    assert not ray_core.is_exit_by_sigterm(text)
    assert (ray_core.parse_lost_host(text), ray_core.parse_memory_use(text)) == (None, None)
    assert ray_core.parse_memory_use("Memory on the node was 7.18GB used / 23GB limit") == ("7.18", "23")
    assert ray_core.parse_lost_host("its node has died.") == ""


SOURCE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from raylit.compat.ray_core import load_exit_imports
load_exit_imports()
assert "ray" not in sys.modules
import ray
load_exit_imports()
os.kill(os.getpid(), signal.SIGINT)
"""


def test_python_ends_by_the_signal():
    done = subprocess.run([sys.executable, "-c", SOURCE], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "KeyboardInterrupt" in done.stderr


def test_outside_of_functions_of_ray_there_is_none():
    assert ray_core.find_function_session() is None
    assert ray_core.find_train_functions() is None


def test_the_session_of_the_process_is_found(monkeypatch):
    session = object()
    monkeypatch.setattr(sessions, "_session", session)
    assert ray_core.find_function_session() is session


def test_train_s_functions_and_reports_are_found(monkeypatch):
    functions = train_fn_utils.LocalTrainFnUtils("experiment")
    monkeypatch.setattr(train_fn_utils, "_train_fn_utils", functions)
    assert ray_core.find_train_functions() is functions
    assert ray_core.count_train_reports() == 0
    monkeypatch.setattr(context, "_train_context", types.SimpleNamespace(report_call_index=3))
    assert ray_core.count_train_reports() == 3


def test_the_config_is_that_of_the_trainable_whose_function_the_thread_runs():
    class Trainable:
        def __init__(self):
            self.config = {"lr": 0.1}

        def start(self):
            return threading.Thread(target=lambda: self.config)

    thread = Trainable().start()
    assert ray_core.read_trial_config(types.SimpleNamespace(training_thread=thread)) == {"lr": 0.1}
    other = threading.Thread(target=lambda: None)
    assert ray_core.read_trial_config(types.SimpleNamespace(training_thread=other)) == {}
    with pytest.raises(RaylitError, match=r"RunnerThread\._target, a private name that ray"):
        ray_core.read_trial_config(types.SimpleNamespace(training_thread=object()))
