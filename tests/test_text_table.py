"""The table that validate and test print."""

import io
import sys

import pytest

from raylit.text_table import print_results_table


def test_one_row_for_each_metric(capsys: pytest.CaptureFixture[str]) -> None:
    print_results_table("test", [{"test_acc": 0.9722222089767456, "test_loss": 0.125}])
    assert capsys.readouterr().out == (
        "┏━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━┓\n"
        "┃        Test metric        ┃        DataLoader 0       ┃\n"
        "┡━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━┩\n"
        "│          test_acc         │     0.9722222089767456    │\n"
        "│         test_loss         │           0.125           │\n"
        "└───────────────────────────┴───────────────────────────┘\n"
    )


@pytest.mark.parametrize(("columns", "num_tables"), [("80", 2), ("100", 1)])
def test_loaders_stand_abreast_where_there_is_room(
    columns: str, num_tables: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print_results_table(
        "validate", [{"loss/dataloader_idx_0": 1.5, "a": 1.0}, {"loss/dataloader_idx_1": 2.5, "b": 2.0}]
    )
    out = capsys.readouterr().out
    assert out.count("Validate metric") == num_tables
    assert "dataloader_idx" not in out
    values = [line.strip("│").replace("│", " ").split() for line in out.splitlines() if line.startswith("│")]
    if num_tables == 1:
        assert values == [["loss", "1.5", "2.5"], ["a", "1.0"], ["b", "2.0"]]
    else:
        assert values == [["loss", "1.5"], ["a", "1.0"], ["loss", "2.5"], ["b", "2.0"]]
    assert all(len(line) <= int(columns) for line in out.splitlines())


@pytest.mark.parametrize("per_loader", [[], [{}], [{}, {}]])
def test_nothing_logged_prints_nothing(per_loader: list[dict[str, float]], capsys: pytest.CaptureFixture[str]) -> None:
    print_results_table("test", per_loader)
    assert capsys.readouterr().out == ""


def test_a_stream_without_box_characters_gets_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    print_results_table("test", [{"loss": 0.5}])
    assert raw.getvalue().decode("ascii").splitlines()[0] == f"+{'=' * 27}+{'=' * 27}+"
