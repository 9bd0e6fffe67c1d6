"""What must hold on a GPU, as functions of the device: every operator, forward and backward, against float64.

tests/gpu runs them on the GPU at hand; tests/kernels/test_gpu_bodies.py runs the same functions on a CPU in Triton's
interpreter, so that they are known to work before a GPU is there.
"""

from typing import Any

import torch
from torch import Tensor

import phicore
from phicore.adapters.dora_scale import scale_columns
from phicore.nf4 import codec, kernels, ops
from phicore.nf4.low_rank import nf4_low_rank
from phicore.nf4.tensor import NF4Tensor
from phicore_kernels.weight import Weight
from tests.kernels.weights import exact, random_weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Each result is rounded once; W is rounded once too, and x A^T in between where there is a low-rank term.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# [out, in]: whole groups of 32 weights, rows that share bytes, groups that straddle rows, sums of several steps
SHAPES = ((64, 128), (70, 96), (33, 77), (3, 640), (160, 1))


NO_GPU = "no GPU that torch sees; the same bodies run in Triton's interpreter, in tests/kernels"


def find_gpu() -> torch.device | None:
    """A GPU of a kind that kernels run on, if there is one."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    return None if gpu is None or gpu.type not in kernels.DEVICE_TYPES else torch.device(gpu.type, 0)


def close(given: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    """The root mean square of the difference is within the bound of dtype."""
    assert given.shape == expected.shape
    assert given.dtype == dtype
    given = given.detach().cpu().double()
    assert given.isfinite().all()
    norm = float(expected.norm()) or 1.0
    assert float((given - expected).norm()) / norm <= factor * BOUND[dtype]


def draw(device: torch.device, *shape: int, dtype: torch.dtype, seed: int, layout: str = "rows") -> Tensor:
    """Normal values of a seed; by layout in rows, as a transposed view, or with gaps."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(dtype).to(device)
    if layout == "columns":
        return values.mT.contiguous().mT.requires_grad_()
    if layout == "gaps":
        return torch.stack([values, values], dim=-1)[..., 0].requires_grad_()
    return values.requires_grad_()


def on(weight: Weight, device: torch.device) -> tuple[tuple[Tensor, ...], list[int], int, Tensor]:
    """An NF4 weight's parts on a device, its shape and block size as the operators take them, and W in float64."""
    parts = (weight.packed, weight.absmax, weight.nested_absmax, weight.offset)
    moved = tuple(part if part is None else part.to(device) for part in parts)
    return moved, [weight.rows, weight.columns], weight.block_size, exact(weight)  # type: ignore[return-value]


def dequantize(device: torch.device, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
    """The bits of the CPU's reference."""
    weight = random_weight(*shape, double_quant=double_quant)
    parts, size, block_size, _ = on(weight, device)
    given = ops.nf4_dequantize(*parts, size, block_size, dtype)
    assert given.device.type == device.type
    absmax = codec.decode_absmax(*weight[1:4]) if double_quant else weight.absmax
    assert torch.equal(given.cpu(), codec.decode_blocks(weight.packed, absmax, given.numel(), 64, dtype).view(size))


def quantize(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, double_quant: bool) -> None:
    """The codes of the CPU's reference, and its scales up to the last bits of the mean."""
    weight = draw(device, *shape, dtype=dtype, seed=1).detach()
    given: NF4Tensor = phicore.nf4.quantize(weight, double_quant=double_quant)
    packed, absmax = codec.encode_blocks(weight.cpu().reshape(-1), 64)
    assert torch.equal(given.packed.cpu(), packed)
    if not double_quant:
        assert torch.equal(given.absmax.cpu(), absmax)
        return
    decoded = codec.decode_absmax(given.absmax, given.nested_absmax, given.offset)
    nested = codec.decode_absmax(*codec.encode_absmax(absmax))
    # a mean summed in another order moves a scale by units of the last place, or one that lies on a bound by a code
    torch.testing.assert_close(decoded.cpu(), nested, rtol=0, atol=0.02 * float((absmax - absmax.mean()).abs().max()))


def linear(
    device: torch.device, m: int, shape: tuple[int, int], dtype: torch.dtype, bias: bool, layout: str
) -> None:  # fmt: skip
    """y = x W^T + b, its gradients, and the products with rows beside x."""
    parts, size, block_size, W = on(random_weight(*shape), device)
    x = draw(device, m, size[1], dtype=dtype, seed=1, layout=layout)
    b = draw(device, size[0], dtype=dtype, seed=2) if bias else None
    grad = draw(device, m, size[0], dtype=dtype, seed=3, layout=layout).detach()
    y = ops.nf4_linear(x, *parts, b, size, block_size)
    x64, g64 = x.detach().cpu().double(), grad.cpu().double()
    close(y, x64 @ W.T + (0 if b is None else b.detach().cpu().double()), dtype)
    gradients = torch.autograd.grad(y, [x] if b is None else [x, b], grad)
    close(gradients[0], g64 @ W, dtype)
    if b is not None:
        close(gradients[1], g64.sum(0), dtype)
    rows = draw(device, 3, size[1], dtype=dtype, seed=4).detach()
    z, WA = ops.nf4_project_with_rows(x, rows, *parts, size, block_size)
    close(z, x64 @ W.T, dtype)
    close(WA, rows.cpu().double() @ W.T, dtype)
    close(torch.autograd.grad(z, x, grad)[0], g64 @ W, dtype)


def low_rank(
    device: torch.device, m: int, shape: tuple[int, int], rank: int, dtype: torch.dtype, with_rows: bool
) -> None:  # fmt: skip
    """y = x W^T + b + s (x A^T) B^T with all its gradients; with_rows, without b and with A W^T."""
    parts, size, block_size, W = on(random_weight(*shape), device)
    x = draw(device, m, size[1], dtype=dtype, seed=1)
    A, B = draw(device, rank, size[1], dtype=dtype, seed=2), draw(device, size[0], rank, dtype=dtype, seed=3)
    b = None if with_rows else draw(device, size[0], dtype=dtype, seed=4)
    y, u, rows = nf4_low_rank(x, A, B, 0.7, *parts, b, size, block_size, with_rows)
    x64, A64, B64 = (t.detach().cpu().double().requires_grad_() for t in (x, A, B))
    b64 = torch.zeros(size[0]) if b is None else b.detach().cpu()
    b64 = b64.double().requires_grad_()
    expected = x64 @ W.T + 0.7 * (x64 @ A64.T) @ B64.T + b64
    close(y, expected.detach(), dtype, 2)
    close(u, (x64 @ A64.T).detach(), dtype)
    close(rows, (A64 @ W.T).detach()[: rank if with_rows else 0], dtype)
    grad = draw(device, m, size[0], dtype=dtype, seed=5).detach()
    inputs, exact_inputs = ([x, A, B], [x64, A64, B64]) if b is None else ([x, A, B, b], [x64, A64, B64, b64])
    given = torch.autograd.grad(y, inputs, grad)
    for g, e in zip(given, torch.autograd.grad(expected, exact_inputs, grad.cpu().double()), strict=True):
        close(g, e, dtype, 2)


def dora_scale(device: torch.device, m: int, shape: tuple[int, int], rank: int, dtype: torch.dtype, bias: bool) -> None:
    """y = (m / ||V'||) * v + b by the dense norm, and the gradients with the norm a constant."""
    n, k = shape
    W = draw(torch.device("cpu"), n, k, dtype=torch.float64, seed=1).detach()
    A, B = (draw(device, *s, dtype=dtype, seed=i).detach() for i, s in ((2, (rank, k)), (3, (n, rank))))
    v = draw(device, m, n, dtype=dtype, seed=4)
    magnitude = draw(device, n, dtype=dtype, seed=5).detach().abs().add(1).requires_grad_()
    b = draw(device, n, dtype=dtype, seed=6) if bias else None
    A64, B64 = A.cpu().double(), B.cpu().double()
    WA = (W @ A64.T).float().to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):  # which must not reach the sums
        y, squared = scale_columns(v, (W * W).sum(1).float().to(device), WA, A, B, magnitude, b, 0.3)
    dense = (W + 0.3 * B64 @ A64).square().sum(1)
    lost = float(((W * W).sum(1) / dense).max()) + 1  # what the terms of the factored form lose where they cancel
    close(squared, dense, torch.float32, lost)
    v64, m64 = v.detach().cpu().double().requires_grad_(), magnitude.detach().cpu().double().requires_grad_()
    b64 = (torch.zeros(n) if b is None else b.detach().cpu()).double().requires_grad_()
    expected = v64 * (m64 / dense.sqrt()) + b64
    close(y, expected.detach(), dtype, lost)
    grad = draw(device, m, n, dtype=dtype, seed=7).detach()
    inputs, exact_inputs = ([v, magnitude], [v64, m64]) if b is None else ([v, magnitude, b], [v64, m64, b64])
    given = torch.autograd.grad(y, inputs, grad)
    for g, e in zip(given, torch.autograd.grad(expected, exact_inputs, grad.cpu().double()), strict=True):
        close(g, e, dtype, 2 * lost)


def layer(device: torch.device, kind: str, m: int, dtype: torch.dtype, init: str = "kaiming") -> None:
    """A QLoRA or QDoRA layer and its gradients equal the dense formula, and its product is the fused operator."""
    torch.manual_seed(0)
    base = phicore.NF4Linear.from_linear(torch.nn.Linear(96, 70)).to(dtype).to(device)
    W, b = base.nf4.dequantize(torch.float64).cpu(), base.bias.detach().cpu().double()  # type: ignore[union-attr]
    make: Any = {"lora": phicore.LoRALinear, "dora": phicore.DoRALinear}[kind]
    adapter = make(base, rank=4, alpha=6.0, init=init)
    with torch.no_grad():
        adapter.lora_B.add_(torch.randn(70, 4).to(adapter.lora_B) * 0.1)
    x = draw(device, 2, m, 96, dtype=dtype, seed=1)
    grad = draw(device, 2, m, 70, dtype=dtype, seed=2).detach()
    with called() as names:
        y = adapter(x)
        trained = [x, *(p for p in adapter.parameters() if p.requires_grad)]
        given = torch.autograd.grad(y, trained, grad)
    fused = {"phicore::nf4_low_rank", "phicore::nf4_low_rank_dx"} | (
        {"phicore::dora_scale"} if kind == "dora" else set()
    )
    assert fused == {name for name in names if name.startswith("phicore::") and name != "phicore::nf4_dequantize"}

    x64, A, B = (t.detach().cpu().double().requires_grad_() for t in (x, adapter.lora_A, adapter.lora_B))
    update = B @ A
    if adapter.start_A is not None:
        update = update - adapter.start_B.cpu().double() @ adapter.start_A.cpu().double()
    V = W + adapter.scaling * update
    exact_inputs = [x64, A, B]
    if kind == "dora":
        magnitude = adapter.magnitude.detach().cpu().double().requires_grad_()
        V = (magnitude / V.detach().norm(dim=1))[:, None] * V
        exact_inputs.append(magnitude)
    expected = x64 @ V.T + b
    close(y, expected.detach(), dtype, 4)
    order = {id(p): i for i, p in enumerate(trained)}
    parameters = [adapter.lora_A, adapter.lora_B] + ([adapter.magnitude] if kind == "dora" else [])
    for e, i in zip(
        torch.autograd.grad(expected, exact_inputs, grad.cpu().double()),
        [0, *(order[id(p)] for p in parameters)],
        strict=True,
    ):
        close(given[i], e, dtype, 4)


def compiled_layer(device: torch.device, kind: str, backend: str) -> None:
    """A layer compiled to one graph equals the layer, gradients included."""
    torch._dynamo.reset()
    base = phicore.NF4Linear.from_linear(torch.nn.Linear(96, 70)).to(device)
    make: Any = {"lora": phicore.LoRALinear, "dora": phicore.DoRALinear}[kind]
    adapter = make(base, rank=4, alpha=6.0)
    with torch.no_grad():
        adapter.lora_B.normal_(std=0.1)
    x = draw(device, 5, 96, dtype=torch.float32, seed=1)
    results = []
    for f in (adapter, torch.compile(adapter, fullgraph=True, backend=backend)):
        y = f(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, adapter.lora_A, adapter.lora_B])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def same_twice(device: torch.device, m: int, dtype: torch.dtype) -> None:
    """Two runs agree bit for bit, forward and backward."""
    parts, size, block_size, _ = on(random_weight(16, 640), device)
    runs = []
    for _ in range(2):
        x = draw(device, m, 640, dtype=dtype, seed=1)
        A, B = draw(device, 4, 640, dtype=dtype, seed=2), draw(device, 16, 4, dtype=dtype, seed=3)
        y, u, _rows = nf4_low_rank(x, A, B, 0.7, *parts, None, size, block_size, False)
        runs.append([y, u, *torch.autograd.grad(y.square().sum(), [x, A, B])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def no_rows(device: torch.device, dtype: torch.dtype) -> None:
    """A batch without rows: shapes and zero gradients."""
    parts, size, block_size, _ = on(random_weight(33, 64), device)
    x = torch.ones(0, 64, dtype=dtype, device=device, requires_grad=True)
    A, B = draw(device, 4, 64, dtype=dtype, seed=2), draw(device, 33, 4, dtype=dtype, seed=3)
    y = ops.nf4_linear(x, *parts, None, size, block_size)
    z, u, rows = nf4_low_rank(x, A, B, 0.7, *parts, None, size, block_size, True)
    assert (y.shape, z.shape, u.shape, rows.shape) == ((0, 33), (0, 33), (0, 4), (4, 33))
    dx, dA, dB = torch.autograd.grad(y.sum() + z.sum(), [x, A, B])
    assert dx.shape == x.shape
    assert not dA.any()
    assert not dB.any()


def far(device: torch.device, rows: int, columns: int) -> None:
    """A weight of `rows` x `columns` whose last two rows alone are not zero: dense, and in a product."""
    n = rows * columns
    packed = torch.full((n // 2,), 0x77, dtype=torch.uint8, device=device)
    packed[-columns:] = 0xFF
    absmax = torch.full((n // 64,), 2.0, device=device)
    parts, size = (packed, absmax, None, None), [rows, columns]
    x = torch.ones(2, columns, dtype=torch.bfloat16, device=device)
    y = ops.nf4_linear(x, *parts, None, size, 64)
    assert not y[:, :-2].any()
    assert (y[:, -2:] == 2 * columns).all()
    dx = ops.nf4_linear_dx(torch.ones(2, rows, dtype=torch.bfloat16, device=device), *parts, size, 64)
    assert (dx == 4).all()
    dense = ops.nf4_dequantize(*parts, size, 64, torch.bfloat16)
    assert (dense[-2:] == 2).all()
    assert not dense[-4:-2].any()


def gaps(device: torch.device, dtype: torch.dtype) -> None:
    """What has gaps in memory (parts, a weight to encode, a magnitude, a bias) is read as it is."""

    def apart(t: Tensor) -> Tensor:
        return torch.stack([t, t + 1], dim=-1)[..., 0]

    parts, size, block_size, _ = on(random_weight(33, 64), device)
    far = tuple(map(apart, parts))
    x = draw(device, 3, 64, dtype=dtype, seed=1).detach()
    dense = ops.nf4_dequantize(*parts, size, block_size, dtype)
    assert torch.equal(ops.nf4_dequantize(*far, size, block_size, dtype), dense)
    y = ops.nf4_linear(x, *parts, None, size, block_size)
    assert torch.equal(ops.nf4_linear(x, *far, None, size, block_size), y)
    given, expected = phicore.nf4.quantize(apart(dense)).parts(), phicore.nf4.quantize(dense).parts()
    assert all(torch.equal(given[name], part) for name, part in expected.items())
    A, B = (draw(device, *s, dtype=dtype, seed=i).detach() for i, s in ((2, (4, 64)), (3, (33, 4))))
    m, b, norm = (draw(device, 33, dtype=torch.float32, seed=i).detach().abs() + 9 for i in (4, 5, 6))
    WA = draw(device, 33, 4, dtype=torch.float32, seed=7).detach()
    z, _ = scale_columns(y, norm, WA, A, B, m, b, 0.3)
    assert torch.equal(scale_columns(y, norm, WA, A, B, apart(m), apart(b), 0.3)[0], z)


class called:
    """A context that notes the names of the operators called in it, backward passes included."""

    def __enter__(self) -> set[str]:
        from torch.utils._python_dispatch import TorchDispatchMode

        names: set[str] = set()

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                names.add(function.name().partition(".")[0])
                return function(*args, **(kwargs or {}))

        self.mode = Mode()
        self.mode.__enter__()
        return names

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)
