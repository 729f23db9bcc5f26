"""A process group of this process alone, for what needs one."""

from collections.abc import Iterator

import pytest
from process_group import process_group_of_one


@pytest.fixture
def process_group() -> Iterator[None]:
    with process_group_of_one():
        yield
