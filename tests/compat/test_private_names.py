"""A private name that is missing is an error that says what needs it, and which version lacks it."""

import pytest
import torch

from raylit.compat.private_names import describe_missing, read_private
from raylit.errors import RaylitError


class Reducer:
    _size = 3


def test_a_name_that_is_there_is_read():
    assert read_private(Reducer(), "_size", feature="x") == 3


def test_a_missing_name_is_an_error_with_the_version_and_what_needs_it():
    version = torch.__version__.partition("+")[0]
    with pytest.raises(RaylitError, match=rf"strategy='ddp' needs Reducer\._flush, .* torch {version}\S* does not"):
        read_private(Reducer(), "_flush", feature="strategy='ddp'")


def test_modules_are_named_and_packages_may_be_missing():
    error = describe_missing(torch, "_x", feature="y", library="no-such-package")
    assert "torch._x" in str(error)
    assert "no-such-package (version unknown)" in str(error)
