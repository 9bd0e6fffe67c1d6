"""PiSSA, OLoRA and LoftQ: what defines each start, that W stays as it is, and how a file holds it."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

import phicore
from phicore.adapters import adapter_layers

BOTH = pytest.mark.parametrize("make", [phicore.LoRALinear, phicore.DoRALinear])
SHIFTED = pytest.mark.parametrize("init", ["pissa", "olora"])
RANK, ALPHA = 4, 7.0


def linear(out: int = 23, inner: int = 37, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inner, out).to(dtype)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation by a rank (Eckart & Young 1936)."""
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] @ S[:rank].diag() @ V[:rank]


def pair(layer) -> Tensor:
    return layer.scaling * layer.lora_B @ layer.lora_A


@BOTH
def test_pissa_is_the_largest_part_of_w(make):
    base = linear()
    layer = make(base, RANK, ALPHA, init="pissa")
    torch.testing.assert_close(pair(layer), truncated(base.weight, RANK))
    torch.testing.assert_close(layer.lora_A.norm(dim=1), layer.lora_B.norm(dim=0))  # the values are halved between them


@BOTH
def test_olora_is_the_first_of_the_qr_decomposition(make):
    base = linear()
    layer = make(base, RANK, ALPHA, init="olora")
    Q, R = torch.linalg.qr(base.weight)
    torch.testing.assert_close(pair(layer), Q[:, :RANK] @ R[:RANK])
    gram = layer.scaling * layer.lora_B.T @ layer.lora_B
    torch.testing.assert_close(gram, torch.eye(RANK, dtype=torch.float64))


@SHIFTED
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(toy, unchanged, init, value):
    model = toy()
    with torch.no_grad():
        model.blocks[1].up_proj.weight[2, 3] = value
    with unchanged(model), pytest.raises(ValueError, match=rf'blocks\.1\.up_proj: init "{init}" .* holds NaN or Inf'):
        phicore.attach(model, phicore.LoRAConfig(rank=RANK, init=init))


@BOTH
@SHIFTED
def test_the_layer_starts_at_its_base_which_stays_as_it_is(make, init):
    base = linear()
    before = copy.deepcopy(base.state_dict())
    layer = make(base, RANK, ALPHA, init=init, rslora=True)
    x = torch.randn(5, 37, dtype=torch.float64)
    torch.testing.assert_close(layer(x), base(x))
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert [name for name, p in layer.named_parameters() if p.requires_grad][:2] == ["lora_A", "lora_B"]


@BOTH
@SHIFTED
def test_the_gradient_is_that_of_the_methods_own_residual_form(make, init):
    """PiSSA writes (W - B0 A0) x + B A x, and so do we, with the difference taken at another place."""
    base = linear()
    layer = make(base, RANK, ALPHA, init=init)
    x = torch.randn(5, 37, dtype=torch.float64)
    A, B = (p.detach().clone().requires_grad_(True) for p in (layer.lora_A, layer.lora_B))
    residual = (base.weight - pair(layer)).detach()
    V = residual + layer.scaling * B @ A
    if make is phicore.DoRALinear:
        V = V * (layer.magnitude / V.norm(dim=1)).detach()[:, None]
    expected = torch.autograd.grad((x @ V.T + base.bias).square().sum(), (A, B))
    for g, e in zip(torch.autograd.grad(layer(x).square().sum(), (layer.lora_A, layer.lora_B)), expected, strict=True):
        torch.testing.assert_close(g, e)
        assert g.abs().max() > 0


@BOTH
@SHIFTED
def test_a_rank_above_that_of_w_is_filled_with_zeros(make, init):
    base = linear(3, 5)
    layer = make(base, 6, ALPHA, init=init)
    torch.testing.assert_close(pair(layer), base.weight)


@SHIFTED
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_file_holds_a_plain_pair_of_twice_the_rank(tiny, randomize, tmp_path, init, dora, rslora):
    ids = torch.arange(1, 13).view(2, 6)
    config = phicore.LoRAConfig(
        rank=RANK,
        alpha=ALPHA,
        init=init,
        dora=dora,
        rslora=rslora,
        rank_pattern={"v_proj": 2},
        target_modules=["q_proj", "v_proj"],
    )
    model = randomize(phicore.attach(tiny("llama"), config))
    phicore.save_adapter(model, tmp_path)
    expected = model(ids).logits
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-6, atol=1e-6)
    ours = phicore.load_adapter(tiny("llama"), tmp_path)
    torch.testing.assert_close(ours(ids).logits, expected)
    assert {layer.rank for _, layer in adapter_layers(ours)} == {2 * RANK, 4}
    with pytest.raises(ValueError, match=f"start of .*: 'plain' in the file, '{init}' here"):
        phicore.load_adapter(model, tmp_path)
    phicore.merge(model)
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loftq_brings_the_coded_base_nearer_to_w(toy, relative_error, dora, dtype):
    model = toy(width=64, hidden=96, dtype=dtype)
    dense = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    phicore.attach(model, phicore.LoRAConfig(rank=16, alpha=ALPHA, init="loftq", dora=dora))
    layers = dict(adapter_layers(model))
    assert layers.keys() == dense.keys() - {"head"}
    for name, layer in layers.items():
        assert isinstance(layer.base, phicore.NF4Linear)
        coded = layer.base.nf4.dequantize(torch.float32)
        before = relative_error(coded, dense[name])
        after = relative_error(layer.merged_weight(), dense[name])
        assert after < 0.9 * before
        best = coded + truncated(dense[name].float() - coded, 16)
        assert after <= relative_error(best, dense[name]) + torch.finfo(dtype).eps
    assert all(p.grad is None for p in model.parameters())


def test_loftq_files_fit_the_same_model_quantized(toy, tmp_path):
    """One iteration codes W itself, so that any NF4 of the same model is the adapter's base."""
    x = torch.randn(3, 10)
    model = phicore.attach(toy(dtype=torch.float32), phicore.LoRAConfig(rank=4, alpha=ALPHA, init="loftq"))
    phicore.save_adapter(model, tmp_path)
    other = phicore.load_adapter(phicore.quantize_(toy(dtype=torch.float32)), tmp_path)
    torch.testing.assert_close(other(x), model(x))


def test_what_is_refused(toy, unchanged):
    coded = phicore.quantize_(toy(dtype=torch.float32))
    with unchanged(coded), pytest.raises(ValueError, match=r"loftq.* is a NF4Linear; attach before quantizing"):
        phicore.attach(coded, phicore.LoRAConfig(init="loftq"))
    dense = toy(dtype=torch.float32)
    with torch.no_grad():
        dense.blocks[1].down_proj.weight[0, 0] = float("nan")
    with unchanged(dense), pytest.raises(ValueError, match=r"blocks\.1\.down_proj\.weight holds NaN or Inf"):
        phicore.attach(dense, phicore.LoRAConfig(init="loftq"))
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    with unchanged(model), pytest.raises(ValueError, match='"pissa" is for linear layers, and 0 is a Embedding'):
        phicore.attach(model, phicore.LoRAConfig(init="pissa", target_modules=["1", "0"]))


def test_loftq_keeps_the_hooks_of_a_layer():
    model, seen = nn.Sequential(nn.Linear(64, 4)), []
    handle = model[0].register_forward_hook(lambda *_: seen.append("hook"))
    phicore.attach(model, phicore.LoRAConfig(rank=2, init="loftq"))(torch.randn(2, 64))
    handle.remove()
    model(torch.randn(2, 64))
    assert seen == ["hook"]
