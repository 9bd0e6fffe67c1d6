"""Models of layers of random kinds, and configurations that fit them: what test_any_model draws from."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import phicore

WIDTH, TOKENS = 8, 12
IDS = torch.tensor([[3, 7, 1, 7], [9, 3, 0, 2], [11, 5, 5, 4]])  # [B, T]


class Residual(nn.Module):
    """x + tanh(layer(x)), [B, T, 8]; of an experts' module or a convolution too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Fused(nn.Module):
    """q, k and v in one layer of 16 rows, as Phi-3 has them."""

    head_dim, num_key_value_heads = 4, 1

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(WIDTH, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x).split([8, 4, 4], -1)
        return q * torch.cat([k, v], -1)


class Convolution(nn.Module):
    """A convolution over the tokens (and the features, where it has more dimensions)."""

    def __init__(self, dimensions: int, groups: int, bias: bool, padding_mode: str) -> None:
        super().__init__()
        options: dict[str, Any] = {"padding": 1, "bias": bias, "padding_mode": padding_mode}
        if dimensions == 1:
            self.conv: nn.Module = nn.Conv1d(WIDTH, WIDTH, 3, groups=groups, **options)
        else:
            self.conv = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(groups, groups, 3, groups=groups, **options)
        self.dimensions, self.groups = dimensions, groups

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 8]
        if self.dimensions == 1:
            return self.conv(x.mT).mT
        image = x.unflatten(-1, (self.groups, -1)).transpose(1, 2)  # [B, groups, T, 8 / groups]
        if self.dimensions == 3:
            image = image.unflatten(-1, (2, -1))
        return self.conv(image).flatten(3).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, bias: bool, separate: bool) -> None:
        super().__init__()
        sizes = {"kdim": WIDTH, "vdim": 6} if separate else {}
        self.mha = nn.MultiheadAttention(WIDTH, 2, bias=bias, batch_first=True, **sizes)
        self.separate = separate

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x[..., :6] if self.separate else x, need_weights=False)[0]


class Experts(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(0.3 * torch.randn(3, WIDTH, 6) if transposed else 0.3 * torch.randn(3, 6, WIDTH))
        self.down = nn.Parameter(0.3 * torch.randn(3, 6, WIDTH) if transposed else 0.3 * torch.randn(3, WIDTH, 6))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.mT if self.is_transposed else w for w in (self.up, self.down))
        return torch.einsum("...eh,eoh->...o", torch.einsum("...i,ehi->...eh", x, up).tanh(), down)


class Net(nn.Module):
    """Tokens [B, T] -> [B, T, 12]."""

    def __init__(self, layers: list[nn.Module], tied: bool, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, TOKENS, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


KINDS = {
    # name -> (the target that means it, how it is built)
    "linear": ("plain", lambda bias, flag: Plain(nn.Linear(WIDTH, WIDTH, bias=bias))),
    "nf4": ("plain", lambda bias, flag: Plain(_nf4(bias, flag))),
    "conv1d": ("plain", lambda bias, flag: Plain(_gpt2())),
    "fused": ("qkv_proj", lambda bias, flag: Fused(bias)),
    "fused nf4": ("qkv_proj", lambda bias, flag: phicore.quantize_(Fused(bias), target_modules=["qkv_proj"])),
    "convolution": ("conv", lambda bias, flag: Convolution(1, 2 if flag else 1, bias, "zeros")),
    "convolution 2": ("conv", lambda bias, flag: Convolution(2, 2 if flag else 1, bias, "circular")),
    "convolution 3": ("conv", lambda bias, flag: Convolution(3, 2 if flag else 1, bias, "replicate")),
    "attention": ("mha", lambda bias, flag: Attention(bias, False)),
    "attention kdim": ("mha", lambda bias, flag: Attention(bias, True)),
    "experts": ("", lambda bias, flag: Experts(flag)),
    "norm": ("", lambda bias, flag: nn.LayerNorm(WIDTH)),
}  # fmt: skip


class Plain(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.plain = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x)


def _gpt2() -> nn.Module:
    from transformers.pytorch_utils import Conv1D  # here, so that ranks without it start fast

    layer = Conv1D(WIDTH, WIDTH)
    nn.init.normal_(layer.bias)
    return layer


def _nf4(bias: bool, double_quant: bool) -> nn.Module:
    return phicore.NF4Linear.from_linear(nn.Linear(WIDTH, WIDTH, bias=bias), double_quant=double_quant)


@dataclass(frozen=True)
class Drawn:
    """A model that can be built again, and a configuration for it."""

    kinds: tuple[tuple[str, bool, bool, bool], ...]  # (kind, bias, flag, the last one again)
    tied: bool
    head_bias: bool
    options: dict[str, Any]

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers: list[nn.Module] = []
            for kind, bias, flag, again in self.kinds:
                layers.append(layers[-1] if again and layers else Residual(KINDS[kind][1](bias, flag)))
            return Net(layers, self.tied, self.head_bias).double().eval()

    def config(self) -> phicore.LoRAConfig:
        return phicore.LoRAConfig(**self.options)


@st.composite
def drawn(draw) -> Drawn:
    """A model and a configuration, most of which go together."""

    def some(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    def rarely() -> bool:
        return draw(st.integers(0, 3)) == 3

    kind = st.tuples(st.sampled_from(list(KINDS)), st.booleans(), st.booleans(), st.booleans())
    kinds = tuple(draw(st.lists(kind, min_size=1, max_size=4)))
    tied = draw(st.booleans())
    names = [f"layers.{i}.layer" for i, (_, _, _, again) in enumerate(kinds) if not again or not i]
    there = sorted({KINDS[k][0] for i, (k, _, _, again) in enumerate(kinds) if not again or not i} - {""})
    targets = draw(st.lists(st.sampled_from([*there, "embed", "head"]), unique=True, min_size=1))
    options: dict[str, Any] = {
        "rank": draw(st.integers(1, 4)),
        "alpha": some(1, 3.5, 16),
        "dora": draw(st.booleans()),
        "rslora": draw(st.booleans()),
        "init": some("kaiming", "gaussian"),
    }
    if targets == ["plain"]:
        options["init"] = some("kaiming", "pissa", "olora")
    if rarely():
        options["bias"] = some("lora_only", "all")
    if tied and {"embed", "head"} & {*targets}:
        options["ensure_weight_tying"] = draw(st.booleans())
    if any(kinds[int(name.split(".")[1])][0] == "experts" for name in names) and draw(st.booleans()):
        options["target_parameters"] = some(["up"], ["up", "down"], ["layer.down"])
        targets = some(targets, [])
    if not {"embed", "head"} & {*targets} and draw(st.booleans()):
        options["trainable_token_indices"] = some([3, 7], {"embed": [9, 1]}, {"head": [2]})
    if "qkv_proj" in targets and draw(st.booleans()):
        options["fused_targets"] = "split"
        targets.remove("qkv_proj")
        targets += some(["q_proj"], ["q_proj", "v_proj"], ["k_proj", "v_proj"])
    if rarely():
        options["rank_pattern"] = {some(".*", names[0] + ".*", "embed"): 5}
    if rarely():
        options["alpha_pattern"] = {some(".*", names[-1] + ".*", "head"): 5}
    if rarely():
        options["exclude_modules"] = [some(names[0], "embed", "head")]
    elif rarely() and "head" not in targets:
        options["modules_to_save"] = ["head"]
    elif rarely():
        options["modules_to_save"] = [names[-1]]
    return Drawn(kinds, tied, draw(st.booleans()), options | {"target_modules": targets})
