"""Private names of Ray's core, tested with the real Ray, without a node where possible."""

import pickle
import time
import types

import pytest
import ray
from ray._private import services
from ray.exceptions import ActorDiedError

from raylit.compat import ray_core
from raylit.compat.private_names import import_private
from raylit.driver.ray import local_cluster
from raylit.errors import RaylitError


@pytest.fixture
def _node():
    local_cluster.connect()


def test_a_missing_name_is_an_error_that_says_which_version_has_it():
    with pytest.raises(RaylitError, match=rf"ray\._private\.worker\.gone.*{ray.__version__}.*install ray==1\.2\.\*"):
        import_private("ray._private.worker", "gone", written_for="1.2")
    with pytest.raises(RaylitError, match="private to ray"):
        import_private("ray.gone", "name", written_for="1.2")


def test_settings_are_read_anew(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray_core.reload_settings()


def test_the_address_of_a_node_is_the_loopback_s_within_the_context_only():
    own = services.get_node_ip_address()
    with ray_core.listen_on_loopback():
        assert services.get_node_ip_address() == "127.0.0.1"
    assert services.get_node_ip_address() == own


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
