"""DoRALinear under torch.compile: one graph, with the norm's branch within an operator, equal to eager."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._ops import HigherOrderOperator
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import phicore
from tests.adapters.dora_layers import IN, OUT, cancelling, random_adapter


def step(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """A layer's output, and the gradients of its squares' sum."""
    y = layer(x)
    return y, *torch.autograd.grad((y**2).sum(), (x, *(p for p in layer.parameters() if p.requires_grad)))


def both_ways(layer: phicore.DoRALinear, compiled: nn.Module, x: Tensor, **tolerance: float) -> None:
    for a, b in zip(step(layer, x), step(compiled, x), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("kind", ["linear", "dora+nf4"])
def test_compiled_in_one_graph_equals_eager(layer_of, randomize, kind):
    torch._dynamo.reset()
    layer = random_adapter(layer_of(kind, OUT, IN)[0], randomize)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    both_ways(layer, compiled, torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True))


class Checkpointed(nn.Module):
    """A layer whose forward pass is run again in the backward pass, all of it or what a policy says."""

    def __init__(self, layer: nn.Module, selective: bool) -> None:
        super().__init__()
        self.layer, self.selective = layer, selective

    def forward(self, x: Tensor) -> Tensor:
        if not self.selective:
            return checkpoint(self.layer, x, use_reentrant=False)
        contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        return checkpoint(self.layer, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("kind", ["linear", "dora+nf4"])
@pytest.mark.parametrize("selective", [False, True])
def test_compiled_with_checkpointing_equals_eager(layer_of, randomize, kind, selective):
    torch._dynamo.reset()
    layer = random_adapter(layer_of(kind, OUT, IN)[0], randomize)
    compiled = torch.compile(Checkpointed(layer, selective), fullgraph=True, backend="aot_eager")
    both_ways(layer, compiled, torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True))


def test_layers_of_other_scalings_compile_too(layer_of, randomize):
    """From the second value on, torch.compile takes a float as an input of the graph."""
    torch._dynamo.reset()
    for alpha in (3, 4, 5):
        layer = random_adapter(layer_of("linear", OUT, IN)[0], randomize, alpha=alpha)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, IN, dtype=torch.float64, requires_grad=True)
        for layer.strength in (1.0, 0.5):
            both_ways(layer, compiled, x)


def test_one_graph_serves_rows_that_cancel_and_rows_that_do_not(layer_of, randomize):
    torch._dynamo.reset()
    layer, _ = cancelling("nf4", layer_of, torch.float32, 1e-3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(3, 12, requires_grad=True)
    both_ways(layer, compiled, x, rtol=1e-2, atol=1e-2)  # products in another order, a thousand times enlarged
    expected = x.double() @ (layer.merged_weight().double()).T + layer.bias.double()
    torch.testing.assert_close(compiled(x).double(), expected, rtol=1e-3, atol=1e-3)
    randomize(layer, std=1.0)
    both_ways(layer, compiled, x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["linear", "nf4", "dora+linear"])
def test_compiled_norm_is_one_operator_and_no_branch(layer_of, randomize, kind):
    """Which torch.compile would compile both ways, in each layer of a model."""
    torch._dynamo.reset()
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    layer = random_adapter(layer_of(kind, OUT, IN)[0], randomize)
    torch.compile(layer, fullgraph=True, backend=keep)(torch.randn(2, IN, dtype=torch.float64))
    (graph,) = graphs
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    assert not [target for target in calls if isinstance(target, HigherOrderOperator)]
    assert calls.count(torch.ops.phicore.dora_norm_squared) == kind.count("dora") + 1


def test_compiled_under_autocast_equals_eager(layer_of, relative_error):
    torch._dynamo.reset()
    layer, _ = cancelling("linear", layer_of, torch.float32, 0.4)  # enough for 16 bits, and little enough to compare
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = torch.randn(5, 12, requires_grad=True)
        for a, b in zip(step(layer, x), step(compiled, x), strict=True):
            assert relative_error(a, b) < 0.03
