"""Patterns of file names."""

import pytest

from raylit.callbacks.model_checkpoint import fill_pattern
from raylit.errors import ConfigError


def test_fields_are_filled_with_their_names_or_alone() -> None:
    metrics = {"epoch": 7, "val/acc": 0.5, "a b": 2}
    assert fill_pattern("x-{epoch:03}-{val/acc:.2f}-{a b}", metrics, equals="=") == "x-epoch=007-val/acc=0.50-a b=2"
    assert fill_pattern("x-{epoch:03}-{val/acc:.2f}-{a b}", metrics, equals=None) == "x-007-0.50-2"


def test_a_missing_metric_counts_as_zero() -> None:
    assert fill_pattern("{gone:.1f}{also:d}", {}, equals=None) == "0.00"


def test_a_name_inside_another_is_not_replaced() -> None:
    assert fill_pattern("{loss}-{loss_b}", {"loss": 1, "loss_b": 2}, equals="=") == "loss=1-loss_b=2"


@pytest.mark.parametrize("value", [0.5, None])
def test_a_spec_that_does_not_fit_names_the_field(value: float | None) -> None:
    with pytest.raises(ConfigError, match=r"'e\{loss:d\}': \{loss:d\} does not fit"):
        fill_pattern("e{loss:d}", {"loss": value}, equals="=")
