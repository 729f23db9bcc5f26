"""The documents for contributors say what is there: paths and names by parsing the source, hooks by running a fit."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest
import torch
from models import Regression, RegressionData

import raylit as pl

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "CONTRIBUTING.md",
    ROOT / "README.md",
    ROOT / "cluster" / "README.md",
    ROOT / "tests" / "benchmarks" / "README.md",
    ROOT / "tests" / "spec" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
NAMES = re.compile(r"(raylit/[\w/]*\.py)::([A-Za-z_][\w.]*)")
PATHS = re.compile(r"(?<![\w/.:-])(?:raylit|tests|examples|docs|cluster|\.ci)/[\w./-]*[\w/]")


def names_in(file: pathlib.Path) -> set[str]:
    """Module-level names, and `Class.member` for methods, class attributes and what methods assign to `self`."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        names.update(names_bound_by(node))
        if isinstance(node, ast.ClassDef):
            members = [name for member in node.body for name in names_bound_by(member)]
            members += [
                inner.attr
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute)
                and isinstance(inner.ctx, ast.Store)
                and isinstance(inner.value, ast.Name)
                and inner.value.id == "self"
            ]
            names.update(f"{node.name}.{member}" for member in members)
    return names


def names_bound_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    yield from (target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_paths_and_names_exist(document: pathlib.Path) -> None:
    text = document.read_text(encoding="utf-8")
    missing = [path for path in PATHS.findall(text) if not (ROOT / path).exists()]
    assert missing == []
    unknown = [f"{path}::{name}" for path, name in NAMES.findall(text) if name.rstrip(".") not in names_in(ROOT / path)]
    assert unknown == []


def test_a_wrong_name_is_found() -> None:
    assert "Trainer.fit" in names_in(ROOT / "raylit/trainer/trainer.py")
    assert "Trainer.fitt" not in names_in(ROOT / "raylit/trainer/trainer.py")
    assert NAMES.findall("see `raylit/api.py::fit`.") == [("raylit/api.py", "fit")]
    assert PATHS.findall("`raylit/api.py` and [docs](docs/design.md)") == ["raylit/api.py", "docs/design.md"]


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{document.name}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
        if not (document.parent / target).exists()
    ]
    assert broken == []


def test_the_glossary_is_sorted() -> None:
    words = re.findall(r"^\*\*(.+?)\*\*", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(words) >= 50
    assert words == sorted(words, key=str.lower)


def test_walks_are_counted() -> None:
    """Each walk of docs/walks.md says how many files it opens: each file of its list counts once."""
    sections = re.split(r"^## ", (ROOT / "docs" / "walks.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    counted = {}
    for section in sections:
        title, _, body = section.partition("\n")
        said = re.search(r"^Files: (\d+)", body, re.MULTILINE)
        steps = re.findall(r"^\d+\. `(raylit/[\w/]*\.py)", body, re.MULTILINE)
        if steps:
            assert said is not None, title
            counted[title] = (int(said[1]), len(dict.fromkeys(steps)))
    assert len(counted) >= 5
    assert {title: said for title, (said, _) in counted.items()} == {title: has for title, (_, has) in counted.items()}


HOOK_LINE = re.compile(r"^ *(driver|worker)  +(.+?)  +(\w+)(?:  |$)")
OWNERS = {"DriverCallback": "driver", "Callback": "callback", "module": "module", "data": "data"}


def drawing(title: str) -> list[str]:
    """The lines of the text block below a heading of docs/design.md."""
    block = re.search(rf"^### {re.escape(title)}\n.*?^```text\n(.*?)^```", DESIGN, re.MULTILINE | re.DOTALL)
    assert block is not None, title
    return block[1].splitlines()


def drawn_hooks(title: str, stage: str = "validation") -> list[str]:
    """(owner.hook) in the order of the drawing; optional hooks, in parentheses there, are left out."""
    hooks: list[str] = []
    for line in drawing(title):
        if "[evaluation loop]" in line:
            hooks += drawn_hooks("The evaluation loop", stage)
        elif (match := HOOK_LINE.match(line)) is not None:
            hook = match[3].replace("STAGE", stage)
            hooks += [f"{OWNERS[owner]}.{hook}" for owner in match[2].split(", ")]
    return hooks


def recording(base: type, owner: str, names: list[str]) -> type:
    """A subclass whose methods of these names write themselves into `calls`."""

    def record(name):
        def hook(self, *args, **kwargs):
            calls.append(f"{owner}.{name}")
            return getattr(base, name)(self, *args, **kwargs)

        return hook

    return type(f"Recording{base.__name__}", (base,), {name: record(name) for name in names})


calls: list[str] = []
DRAWN = {
    owner: {
        hook.partition(".")[2]
        for title in ("fit", "The evaluation loop", "validate, test and predict")
        for stage in ("validation", "test", "predict")
        for hook in drawn_hooks(title, stage)
        if hook.startswith(f"{owner}.")
    }
    for owner in OWNERS.values()
}


def recorded(entry: str) -> list[str]:
    """The hooks of a run over one batch of each loader, in the order of their calls, in this process."""

    class Base(Regression):
        def training_epoch_end(self, outputs): ...
        def validation_epoch_end(self, outputs): ...
        def test_epoch_end(self, outputs): ...
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    class Data(RegressionData):
        def setup(self, stage=None):
            super().setup()

    model = recording(Base, "module", sorted(DRAWN["module"] - {"predict_epoch_end"}))()
    data = recording(Data, "data", sorted(DRAWN["data"]))(batch_size=24, num_val=20)
    trainer = pl.Trainer(
        num_workers=0,
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=1,
        limit_test_batches=1,
        limit_predict_batches=1,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            recording(pl.Callback, "callback", sorted(DRAWN["callback"]))(),
            recording(pl.DriverCallback, "driver", sorted(DRAWN["driver"]))(),
        ],
    )
    calls.clear()
    getattr(trainer, entry)(model, datamodule=data)
    return list(calls)


def test_the_drawing_of_fit_is_the_order_of_calls() -> None:
    assert recorded("fit") == drawn_hooks("fit")


@pytest.mark.parametrize(("entry", "stage"), [("validate", "validation"), ("test", "test"), ("predict", "predict")])
def test_the_drawing_of_the_other_loops_is_the_order_of_calls(entry: str, stage: str) -> None:
    expected = [hook for hook in drawn_hooks("validate, test and predict", stage) if hook != "module.predict_epoch_end"]
    assert [hook for hook in recorded(entry) if not hook.endswith("_dataloader")] == expected


def test_every_hook_is_drawn() -> None:
    names = names_in(ROOT / "raylit/core/module.py") | names_in(ROOT / "raylit/callbacks/base.py")
    known = {name.partition(".") for name in names}
    hooks = {hook for base, _, hook in known if base in ("LoopHooks", "Callback", "DriverCallback")}
    text = "".join(DESIGN.replace("STAGE", stage) for stage in ("validation", "test", "predict"))
    missing = [hook for hook in sorted(hooks) if not hook.startswith("_") and not re.search(rf"\b{hook}\b", text)]
    assert missing == ["state_key"]
