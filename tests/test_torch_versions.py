"""What stands for what a version of torch lacks does what torch's own does in the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from murf_fast import _torch_versions
from murf_fast._torch_versions import known_equal


@pytest.mark.parametrize("ask", [_torch_versions._any_requires_grad, _torch_versions.any_requires_grad])
def test_any_requires_grad_looks_into_lists(ask):
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert ask(plain, None, 3, "native", leaf)
    assert ask(None, [plain, leaf])
    assert not ask(plain, None, 3, [1, 2], [plain, plain], "native")
    assert not ask()


@pytest.mark.parametrize("ask", [_torch_versions._has_any_global_hook, _torch_versions.has_any_global_hook])
@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_every_module_are_seen(ask, register):
    assert not ask()
    handle = register(lambda *arguments: None)
    try:
        assert ask()
    finally:
        handle.remove()
    assert not ask()


def test_sizes_of_no_graph_are_compared():
    assert known_equal((6, 5), (6, 5))
    assert not known_equal((6, 5), (5, 6))


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="an open size is compared by Dynamo of this torch")
def test_the_question_leaves_open_sizes_open():
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: x + known_equal(x.shape, (6, 6)), dynamic=True, fullgraph=True, backend=count
    )  # fmt: skip
    for n in (5, 6, 7):
        assert torch.equal(compiled(torch.zeros(n, n + 1))[0], torch.zeros(n + 1))
        assert torch.equal(compiled(torch.zeros(n, 6))[0], torch.zeros(6)), "a size that is open equals nothing"
    assert len(graphs) <= 2  # one for squares is torch's right
    torch.compiler.reset()
    compiled = torch.compile(lambda x: x + known_equal(x.shape, (6, 6)), dynamic=False, fullgraph=True, backend=count)
    assert torch.equal(compiled(torch.zeros(6, 6)), torch.ones(6, 6))
    assert torch.equal(compiled(torch.zeros(6, 5)), torch.zeros(6, 5))
