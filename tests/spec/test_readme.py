"""The list of the page's promises names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_named_test_exists():
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", (HERE / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 60
    for file, name in named:
        path = HERE.parents[1] / file if "/" in file else HERE / file
        assert re.search(rf"^ *def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE), f"{file}::{name}"


def test_every_row_names_a_test():
    rows = [line for line in (HERE / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [row for row in rows if "::test_" not in row and not row.startswith("| the page")] == []


def test_every_cool_feature_is_listed():
    """The page's own bullets."""
    features = (
        *("Automatic checkpointing", "Automatic early stopping", "Automatically overfit your model for a sanity test"),
        *("Automatic truncated back-propagation through time", "Automatically scale your batch size"),
        *("Automatically attempt to find a good learning rate", "Add arbitrary callbacks"),
        *("Hit every line of your code once", "Load checkpoints directly from S3"),
        *(
            "Move from CPUs to GPUs or TPUs without code changes",
            "Profile your code",
            "Scale to massive compute clusters",
        ),
        *("Use multiple dataloaders per train, val and test loop", "Use multiple optimizers"),
    )
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert [feature for feature in features if f"\n| {feature}" not in text] == []
