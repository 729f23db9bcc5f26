"""What is known of torch's compiler in this process. With a backend that needs no C++ compiler."""

import textwrap

import pytest
import torch
from torch import nn

from raylit.compat import torch_dynamo


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Scaling(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def compiled(module):
    module.compile(backend="eager")
    return module


def count_compilations(call):
    started, ended = [], []
    callbacks = {"on_start": started.append, "on_end": ended.append}
    torch_dynamo.add_compilation_callbacks(**callbacks)
    call()
    torch_dynamo.remove_compilation_callbacks(**callbacks)
    assert len(ended) == len(started)
    return len(started)


def test_a_callback_is_called_at_each_compilation_until_it_is_removed():
    module = compiled(Scaling(1))
    assert count_compilations(lambda: module(torch.ones(1))) == 1
    assert count_compilations(lambda: module(torch.ones(1))) == 0
    torch_dynamo.remove_compilation_callbacks(on_start=print, on_end=print)


def test_a_reset_makes_the_compiler_compile_again():
    module = compiled(Scaling(1))
    module(torch.ones(1))
    torch_dynamo.reset_compiler()
    assert count_compilations(lambda: module(torch.ones(1))) == 1


def test_compilations_are_listed_with_their_reasons():
    module = compiled(Scaling(1))
    module(torch.ones(1))
    module.factor = 2
    module(torch.ones(1))
    latest = torch_dynamo.list_compilations()[-1]
    assert (latest.co_name, latest.co_filename) == ("forward", __file__)
    assert "factor" in latest.recompile_reason
    assert latest.co_firstlineno > 0


def test_a_module_comes_out_of_the_one_that_compile_returns():
    module, seen = nn.Linear(1, 1), []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    assert torch_dynamo.unwrap_optimized(module) is None
    original, compiler = torch_dynamo.unwrap_optimized(torch.compile(module, backend=backend))
    assert original is module
    compiler(lambda x: x + 1)(torch.ones(1))
    assert len(seen) == 1


def test_the_compiler_of_a_module_compiles_others_alike():
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    module = nn.Linear(1, 1)
    assert torch_dynamo.read_compiler(module) is None
    module.compile(backend=backend)
    torch_dynamo.read_compiler(module)(lambda x: x + 1)(torch.ones(1))
    assert len(seen) == 1


def test_a_script_that_is_another_program_here_keeps_its_globals():
    scope = {"__name__": "__main__", "nn": nn, "offset": 3}
    source = """
        class Adding(nn.Module):
            def forward(self, x):
                return x + offset
    """
    exec(textwrap.dedent(source), scope)
    module = nn.Sequential(scope["Adding"](), nn.Identity())
    torch_dynamo.isolate_script_globals(module)
    call = torch.compile(lambda x: module(x), backend="eager", fullgraph=True)
    assert call(torch.ones(1)).item() == 4
    assert nn.Identity.forward.__globals__["__name__"] == nn.Identity.__module__
