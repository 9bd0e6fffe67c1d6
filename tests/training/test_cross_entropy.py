"""The chunked cross-entropy equals torch's own of the whole logits, taken in float64, and never holds them."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from phicore.training import cross_entropy
from phicore.training.cross_entropy import linear_cross_entropy

Measure = Callable[[Tensor, Tensor], float]


def operands(
    rows: int, inner: int, classes: int, dtype: torch.dtype, *, bias: bool = True, ignored: float = 0.3, seed: int = 0
) -> tuple[list[Tensor | None], Tensor]:
    """hidden, weight and bias, all of which train, and targets, some of them -100."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, inner), (classes, inner), (classes,)]
    made: list[Tensor | None] = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    if not bias:
        made[2] = None
    targets = torch.randint(classes, (rows,), generator=generator)
    return made, targets.masked_fill(torch.rand(rows, generator=generator) < ignored, -100)


def exact(tensors: list[Tensor | None], targets: Tensor, factor: float) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of factor times it, by torch in float64."""
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    hidden, weight, bias = wide
    logits = nn.functional.linear(hidden, weight, bias)  # type: ignore[arg-type]
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss, list(torch.autograd.grad(factor * loss, [t for t in wide if t is not None]))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_elements", lambda _device: 40)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_equals_torch_of_the_whole_logits(dtype: torch.dtype, tolerance: float) -> None:
    @given(
        rows=st.integers(0, 23), inner=st.integers(1, 9), classes=st.integers(1, 50), bias=st.booleans(),
        ignored=st.sampled_from([0.0, 0.4, 1.0]), seed=st.integers(0, 99),
    )  # fmt: skip
    def check(rows: int, inner: int, classes: int, bias: bool, ignored: float, seed: int) -> None:
        tensors, targets = operands(rows, inner, classes, dtype, bias=bias, ignored=ignored, seed=seed)
        loss = linear_cross_entropy(*tensors, targets)  # type: ignore[arg-type]
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        present = [t for t in tensors if t is not None]
        given = torch.autograd.grad(2.5 * loss, present)
        expected_loss, expected = exact(tensors, targets, 2.5)
        scale = max(1.0, expected_loss.item())
        assert abs(float(loss.detach().double() - expected_loss)) <= tolerance * scale
        for gradient, truth, tensor in zip(given, expected, present, strict=True):
            assert gradient.dtype == tensor.dtype
            # Beside the size that rounding the logits leaves, not beside gradients that cancel to almost nothing.
            assert float((gradient.double() - truth).norm()) <= 4 * tolerance * max(float(truth.norm()), 1.0)

    check()


def test_sums_over_chunks_are_float32(monkeypatch: pytest.MonkeyPatch, relative_error: Measure) -> None:
    """In bfloat16 a sum over 2,000 chunks would stop growing after some hundred."""
    monkeypatch.setattr(cross_entropy, "chunk_elements", lambda _device: 3)
    tensors, _ = operands(2000, 4, 3, torch.bfloat16)
    targets = torch.ones(2000, dtype=torch.int64)
    loss = linear_cross_entropy(*tensors, targets)  # type: ignore[arg-type]
    expected_loss, expected = exact(tensors, targets, 1.0)
    assert relative_error(loss, expected_loss) < 1e-3
    for gradient, truth in zip(torch.autograd.grad(loss, tensors), expected, strict=True):  # type: ignore[arg-type]
        assert relative_error(gradient, truth) < 6e-3


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False)])
def test_gradcheck(trained: tuple[bool, bool, bool]) -> None:
    tensors, targets = operands(9, 4, 15, torch.float64)
    for tensor, trains in zip(tensors, trained, strict=True):
        assert tensor is not None
        tensor.requires_grad_(trains)
    assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, targets), tensors)


@pytest.mark.usefixtures("small_chunks")
def test_under_autocast_products_are_of_16_bits_and_sums_are_not(relative_error: Measure) -> None:
    tensors, targets = operands(12, 8, 15, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(*tensors, targets)  # type: ignore[arg-type]
        logits = nn.functional.linear(*tensors)  # type: ignore[arg-type]
    assert loss.dtype == torch.float32
    whole = float(nn.functional.cross_entropy(logits.double(), targets, reduction="sum"))
    assert float(loss) == pytest.approx(whole, rel=5e-4)  # products of 16 bits may be rounded, sums may not
    expected = torch.autograd.grad(nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), tensors)  # type: ignore[arg-type]
    for gradient, truth in zip(torch.autograd.grad(loss, tensors), expected, strict=True):  # type: ignore[arg-type]
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, truth) < 2e-2


def test_targets_that_are_no_classes_are_named() -> None:
    tensors, targets = operands(4, 2, 5, torch.float32, ignored=0)
    for wrong in (5, -1):
        targets[2] = wrong
        with pytest.raises(IndexError, match=rf"0 to 4 or -100, got \[.*{wrong}"):
            linear_cross_entropy(*tensors, targets)  # type: ignore[arg-type]


class Largest(TorchDispatchMode):
    """The most elements that any operator has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


def test_no_tensor_is_larger_than_a_chunk(
    monkeypatch: pytest.MonkeyPatch, saved_for_backward: Callable[..., list[Tensor]]
) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_elements", lambda _device: 1000)
    tensors, targets = operands(300, 4, 97, torch.float32, ignored=0)
    hidden, weight, bias = tensors
    assert weight is not None
    assert bias is not None
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, bias, targets).backward()  # type: ignore[arg-type]
    assert largest.elements <= 300 * 4  # hidden's own size; a chunk has 10 x 97, all logits 29,100
    kept = saved_for_backward(lambda: linear_cross_entropy(hidden, weight, bias, targets), nn.Module())  # type: ignore[arg-type]
    assert [t.numel() for t in kept] == [300 * 4]
