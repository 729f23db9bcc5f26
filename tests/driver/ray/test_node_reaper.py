"""The node reaper removes the embedded node's processes and directory, and nothing else."""

import os
import signal
import subprocess
import sys
import time

import pytest

from raylit.driver.ray.node_reaper import MARK, NodeReaper

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


@pytest.fixture
def start():
    """Start a process with the mark of a directory's node."""
    started = []

    def start_marked(directory, command=SLEEP, **options):
        process = subprocess.Popen(command, env={**os.environ, MARK: str(directory)}, **options)
        started.append(process)
        return process

    yield start_marked
    for process in started:
        process.kill()
        process.wait(timeout=10)


def is_gone(path, limit_s=15.0):
    deadline = time.monotonic() + limit_s
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not path.exists()


def test_only_the_nodes_processes_are_ended(tmp_path, start):
    directory, other = tmp_path / "own", tmp_path / "other"
    directory.mkdir()
    title = ["bash", "-c", f"exec -a ray::Something {sys.executable} -S -c 'import time; time.sleep(60)'"]
    (directory / "log").touch()
    with open(directory / "log", "w") as log:
        own = [start(directory), start(directory, title), start("", title, stdout=log)]
    spared = [start(other), start(other, title), start("", title), start(directory, start_new_session=True)]
    time.sleep(0.2)  # for bash to become what it starts
    reaper = NodeReaper(str(directory))
    assert [process.poll() for process in own] == [None] * 3
    reaper.finish()
    assert [process.wait(timeout=10) for process in own] == [-signal.SIGKILL] * 3
    assert [process.poll() for process in spared] == [None] * 4
    assert not directory.exists()


DRIVER = """
import os, sys, time
from raylit.driver.ray.node_reaper import NodeReaper
reaper = NodeReaper(sys.argv[1])
if os.fork():
    print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_driver_is_noticed_even_if_its_fork_is_alive(tmp_path):
    directory = tmp_path / "own"
    directory.mkdir()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(directory)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert driver.stdout.readline() == "ready\n"
    driver.kill()
    driver.wait(timeout=10)
    gone = is_gone(directory)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.stdout.close()
    assert gone


def test_directories_of_killed_reapers_are_removed_by_the_next_one(tmp_path):
    directories = [tmp_path / f"rl-{name}" for name in ("killed", "living", "young", "foreign", "own")]
    for directory in directories:
        directory.mkdir()
    killed, living, young, _, own = directories
    reapers = [NodeReaper(str(directory)) for directory in (killed, living, young)]
    for reaper in (reapers[0], reapers[2]):
        reaper._process.kill()
        reaper._process.wait(timeout=10)
    long_ago = time.time() - 100
    for directory in (killed, living):
        os.utime(directory / "raylit.lock", (long_ago, long_ago))
    last = NodeReaper(str(own))
    assert is_gone(killed)
    last.finish()
    assert [directory.exists() for directory in directories] == [False, True, True, True, False]
    reapers[1].finish()
    assert not living.exists()


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("num_stopped", [1, 2])
def test_a_node_that_fails_to_start_is_ended_and_started_again(num_stopped, run_script, tmp_path_factory):
    output = run_script(
        f"""
        import glob, os, signal, tempfile, threading, time
        import raylit as pl
        from raylit.driver.ray import local_cluster

        def raylets():
            for path in glob.glob("/proc/[0-9]*/cmdline"):
                try:
                    command = open(path, "rb").read()
                except OSError:
                    continue
                if command.split(b"\\0")[0].endswith(b"/raylet") and directory.encode() in command:
                    yield int(path.split("/")[2])

        def stop_the_first():
            while len(stopped) < {num_stopped}:
                for pid in set(raylets()) - stopped:
                    os.kill(pid, signal.SIGSTOP)
                    stopped.add(pid)
                time.sleep(0.05)

        if __name__ == "__main__":
            stopped = set()
            with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as directory:
                os.environ["RAY_TMPDIR"] = directory
                thread = threading.Thread(target=stop_the_first, daemon=True)
                thread.start()
                try:
                    local_cluster.connect()
                    print("started")
                except pl.ResourcesError as error:
                    print(error, error.__cause__)
                thread.join()
                # A process that a raylet has just forked looks like one, and may have been stopped with it.
                print(len(stopped) >= {num_stopped}, "left:", stopped & set(raylets()))
                local_cluster.shutdown()
                print(os.listdir(directory))
        """,
        timeout_s=200.0,
    )
    first, *rest = output.splitlines()
    assert first == "started" if num_stopped == 1 else "did not start, twice" in first
    assert rest == ["True left: set()", "[]"]


def test_only_node_directories_of_this_user_are_removed(tmp_path):
    names = ("project", "rl-link", "rl-stranger", "rl-linked-lock", "rl-abandoned", "rl-own")
    project, link, stranger, linked, abandoned, own = (tmp_path / name for name in names)
    for directory in (project, stranger, linked, abandoned, own):
        directory.mkdir()
    for directory in (project, stranger, abandoned):
        (directory / "raylit.lock").touch()
        os.utime(directory / "raylit.lock", (0, 0))
    link.symlink_to(project)
    (linked / "raylit.lock").symlink_to(project / "raylit.lock")
    others = [project, link, linked]
    if os.geteuid() == 0:
        os.chown(stranger, 65534, 65534)
        others.append(stranger)
    reaper = NodeReaper(str(own))
    assert is_gone(abandoned)
    reaper.finish()
    assert [path.exists() for path in others] == [True] * len(others)
    assert (project / "raylit.lock").exists()


def test_processes_in_a_session_of_the_node_end_with_it(tmp_path, start):
    directory = tmp_path / "own"
    directory.mkdir()
    # As a node's process that has gone, and what it has started: marked, but not Ray's.
    process = start(directory, start_new_session=True)
    (directory / "raylit.sessions").write_text(f"{process.pid}\n")
    NodeReaper(str(directory)).finish()
    assert process.wait(timeout=10) == -signal.SIGKILL
