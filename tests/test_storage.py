"""Local paths and URLs by one set of functions."""

import os

import pytest

from raylit.storage import absolute, is_inside, join, list_names, make_directory, read_text, relative, write_text


@pytest.fixture(params=["local", "memory", "file"])
def directory(request, tmp_path):
    """A local path, a store without directories and a file system behind a URL."""
    return {"local": str(tmp_path), "memory": f"memory://{tmp_path}", "file": f"file://{tmp_path}"}[request.param]


def test_a_text_is_read_as_it_was_written_and_listed(directory):
    path = join(directory, "a", "b.txt")
    assert read_text(path) is None
    assert list_names(join(directory, "a")) == []
    write_text("first", path)
    write_text("grün\r\n", path)
    assert read_text(path) == "grün\r\n"
    assert list_names(join(directory, "a")) == ["b.txt"]
    make_directory(join(directory, "a"))
    assert list_names(join(directory, "a")) == ["b.txt"]


def test_a_path_lies_in_its_directories(directory):
    path = join(directory, "runs", "b.ckpt")
    assert is_inside(path, directory)
    assert is_inside(path, join(directory, "runs"))
    assert not is_inside(path, join(directory, "run"))


def test_absolute_leaves_urls_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("runs") == os.path.realpath(tmp_path / "runs")
    assert absolute("s3://bucket/runs/") == "s3://bucket/runs"


def test_a_path_that_leads_out_of_a_directory_does_not_lie_in_it(directory):
    inside = join(directory, "runs")
    for name in ("../b.ckpt", "a/../../b.ckpt", "..", ".", "a/.."):
        assert not is_inside(join(inside, name), inside), name


def test_a_link_decides_where_a_path_lies(tmp_path):
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    for made in (runs, elsewhere):
        made.mkdir()
    (runs / "link").symlink_to(elsewhere)
    (tmp_path / "same").symlink_to(runs)
    for start in ("", "file://"):
        assert not is_inside(f"{start}{runs}/link/b.ckpt", f"{start}{runs}")
        assert is_inside(f"{start}{runs}/link", f"{start}{runs}")
        assert is_inside(f"{start}{tmp_path}/same/b.ckpt", f"{start}{runs}")
        assert is_inside(f"{start}{runs}/b.ckpt", f"{start}{tmp_path}/same")
        assert is_inside(f"{start}{runs}/link/../runs/b.ckpt", f"{start}{runs}")
    assert relative(f"{tmp_path}/same/a/b.ckpt", str(runs)) == "a/b.ckpt"
    assert relative(f"{runs}/link/b.ckpt", str(runs)) == f"{runs}/link/b.ckpt"


def test_urls_in_chains_lie_nowhere():
    assert not is_inside("s3://bucket/runs/x::file:///etc/b.ckpt", "s3://bucket/runs")
    assert not is_inside("s3://bucket/runs/file:///etc/b.ckpt", "s3://bucket/runs")
