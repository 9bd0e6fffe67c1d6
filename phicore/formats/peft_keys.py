"""Keys and shapes of an adapter's tensors in PEFT's file.

A key is "base_model.model." + the module's name + ".lora_A.weight" [rank, in], ".lora_B.weight" [out, rank],
".lora_magnitude_vector" [out] (DoRA); of an embedding ".lora_embedding_A" [rank, num], ".lora_embedding_B" [dim, rank];
of a convolution ".lora_A.weight" [rank, in, *kernel], ".lora_B.weight" [out, rank / groups, 1, ...] and a magnitude
[1, out, 1, ...]; of a trained bias ".base_layer.bias" [out], or ".bias" where the layer has no pair; of trained rows of
an embedding ".token_adapter.trainable_tokens_delta" [k, dim], which are values; or, for a module trained whole, the
name of one of its own tensors. The adapter's name is not in the file.

The pairs of a parameter of a module (target_parameters) are one, A [experts * rank, in] and B [out, rank * experts],
under the module's name. Where several of its parameters are adapted, PEFT nests a wrapper for each: that of the last
parameter stands at the module's name, and each other one a ".base_layer" further in. PEFT refuses DoRA for parameters;
such a file has a ".lora_magnitude_vector" [experts, out] beside each pair, for phicore alone.

An embedding and its head with one pair (ensure_weight_tying) have it twice, under the keys of both. With DoRA they have
one magnitude a token, in the embedding's keys as [num, 1]: PEFT, which has one a dimension [dim] there, refuses it.

nn.MultiheadAttention has the pair of in_proj under its own name and that of out_proj under ".base_layer.out_proj", both
of one rank; the smaller is filled up with zeros. PEFT computes with twice out_proj's product (it adds it to the weight,
and then merges it), so its B is half in the file, which is what a file means that PEFT wrote. PEFT refuses DoRA for it,
and kdim and vdim; such adapters are written with these keys, and those of q_proj, k_proj, v_proj and out_proj under
their names, for phicore alone.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from phicore.adapters.attention import is_packed, layer_setting, projections
from phicore.adapters.config import LoRAConfig
from phicore.adapters.convolution import LowRankConvolution
from phicore.adapters.dora import DoRALayer
from phicore.adapters.embedding import DoRAEmbedding, LowRankEmbedding
from phicore.adapters.experts import DoRAExperts, LoRAExperts, stacked_shape
from phicore.adapters.fused import FusedLinear, Split, splits
from phicore.adapters.layers import AdapterLayer, adapter_layers, layer_class, merged_layers
from phicore.adapters.lora import LowRankLayer, LowRankLinear
from phicore.adapters.parameters import named_stacks, plan_parameters
from phicore.adapters.plan import parts_beside, plan
from phicore.adapters.tied import TiedDoRAEmbedding, owners_of_tied
from phicore.adapters.token_rows import TrainedRows
from phicore.adapters.trained import TrainedBias, TrainedCopy, TrainedPart, trains_bias

PREFIX = "base_model.model."
BIAS, ROWS = ".base_layer.bias", ".token_adapter.trainable_tokens_delta"


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The adapter's own tensors (not copies) by their keys in PEFT's file; of a start that is taken off again (pissa,
    olora), of parameters and of the parts of a fused layer, the plain pairs that they amount to.

    Raises:
        ValueError: the model has no such adapter, or is merged.
    """
    layers = list(adapter_layers(model, name))
    if not layers:
        names = sorted({layer.adapter_name for _, layer in adapter_layers(model)})
        state = "is merged; unmerge it first" if any(merged_layers(model)) else f"has the adapters {names}"
        raise ValueError(f'no adapter named "{name}" to read: the model {state}')
    return {key: tensor for path, layer in layers for key, tensor in _layer_tensors(model, path, layer).items()}


def _layer_tensors(model: nn.Module, path: str, layer: AdapterLayer) -> dict[str, Tensor]:
    if isinstance(layer, TrainedPart):
        return part_tensors(path, layer)
    if isinstance(layer, LoRAExperts):
        return _expert_tensors(path, layer)
    rank = doubled_rank(layer, settings_of(model, path, layer)[1])
    tensors = _pair_tensors(place_of(model, path), layer, rank)
    if is_added_twice(model, path, layer):
        tensors = {key: tensor / 2 if ".lora_B" in key else tensor for key, tensor in tensors.items()}
    if layer.trained_bias is not None:
        tensors[place_of(model, path) + BIAS] = layer.trained_bias
    return tensors


def part_tensors(path: str, part: TrainedPart) -> dict[str, Tensor]:
    """What a part trains, by its keys; writing to these tensors writes to the part."""
    if isinstance(part, TrainedCopy):
        return {f"{PREFIX}{path}.{key}": tensor for key, tensor in part.trained.state_dict(keep_vars=True).items()}
    if isinstance(part, TrainedRows):
        return {PREFIX + path + ROWS: part.trained} if part.owner else {}
    assert isinstance(part, TrainedBias)
    return {f"{PREFIX}{path}.bias": part.trained}


def _pair_tensors(place: str, layer: LowRankLayer, rank: int) -> dict[str, Tensor]:
    """A pair and its magnitude by their keys, filled up to a rank if it is smaller."""
    key_A, key_B, magnitude = _endings(type(layer))
    A, B = layer.matrices() if start_is_taken_off(layer) else (layer.lora_A, layer.lora_B)
    if missing := rank - A.shape[0]:
        A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
    tensors: dict[str, Tensor] = {place + key_A: A, place + key_B: B}
    if isinstance(layer, DoRALayer):
        tensors[place + magnitude] = layer.magnitude.view(
            _magnitude_shape(type(layer), layer.lora_A.shape, layer.lora_B.shape)
        )
    if isinstance(layer, FusedLinear):  # whose magnitudes beside the parts are the base's norms, in float32
        tensors = {key: tensor.to(A.dtype) for key, tensor in tensors.items()}
    return tensors


def fill_pair(place: str, layer: LowRankLayer, tensors: dict[str, Tensor]) -> None:
    """Sets the pair of a layer, its magnitude and its trained bias from a file's tensors."""
    key_A, key_B, magnitude = (place + ending for ending in _endings(type(layer)))
    A, B = tensors[key_A][: layer.rank], tensors[key_B]
    B = B[:, : layer.rank] if B.dim() == 2 else B
    if isinstance(layer, FusedLinear):
        layer.set_matrices(A, B)
    else:
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    if isinstance(layer, DoRALayer):
        layer.set_magnitude(tensors[magnitude].flatten())
    if layer.trained_bias is not None:
        layer.trained_bias.copy_(tensors[place + BIAS])


def start_is_taken_off(layer: LowRankLayer | LoRAExperts) -> bool:
    """Whether the layer computes W + scaling * (B A - its start): a plain pair of twice the rank, for a reader."""
    return isinstance(layer, LowRankLinear) and layer.start_A is not None


def doubled_rank(layer: LowRankLayer | LoRAExperts, rank: int) -> int:
    """The rank in the file, of the one that the layer has."""
    return 2 * rank if start_is_taken_off(layer) else rank


def doubled_alpha(layer: LowRankLayer | LoRAExperts, alpha: float) -> float:
    """What gives the layer's scaling with the rank in the file."""
    if not start_is_taken_off(layer):
        return alpha
    return alpha * (math.sqrt(2) if layer.rslora else 2)


def _endings(kind: type[LowRankLayer]) -> tuple[str, str, str]:
    """What stands behind a module's name in the keys of A, B and the magnitude."""
    if issubclass(kind, LowRankEmbedding):
        return ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector"
    return ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def _magnitude_shape(kind: type[LowRankLayer], shape_A: tuple[int, ...], shape_B: tuple[int, ...]) -> tuple[int, ...]:
    """[out]; [1, out, 1, ...] of a convolution; [num, 1] of an embedding whose head shares it."""
    if issubclass(kind, TiedDoRAEmbedding):
        return (shape_A[1], 1)
    return (1, shape_B[0], *shape_B[2:]) if issubclass(kind, LowRankConvolution) else (shape_B[0],)


# ===== nn.MultiheadAttention =====


def packed_attention(model: nn.Module, path: str) -> tuple[str, nn.MultiheadAttention] | None:
    """The attention, with its name, that PEFT has as one layer, if a layer of this name is its in_proj or out_proj."""
    parent, _, last = path.rpartition(".")
    owner = model.get_submodule(parent) if last in ("in_proj", "out_proj") else None
    return (parent, owner) if isinstance(owner, nn.MultiheadAttention) and is_packed(owner) else None


def place_of(model: nn.Module, path: str) -> str:
    """What the keys of a layer start with."""
    found = packed_attention(model, path)
    if found is None:
        return PREFIX + path
    return PREFIX + found[0] + ("" if path.endswith(".in_proj") else ".base_layer.out_proj")


def is_added_twice(model: nn.Module, path: str, layer: LowRankLayer) -> bool:
    """Whether PEFT 0.21.2 computes with twice a layer's product: out_proj of an attention that it reads."""
    found = packed_attention(model, path)
    return found is not None and path.endswith(".out_proj") and not isinstance(layer, DoRALayer)


def settings_of(model: nn.Module, path: str, layer: LowRankLayer) -> tuple[str, int, float]:
    """The name by which a file knows a layer, and its rank and alpha there (of a start that is taken off, half of it).

    Raises:
        ValueError: in_proj and out_proj of an nn.MultiheadAttention have different scalings.
    """
    found = packed_attention(model, path)
    if found is None:
        return path, layer.rank, layer.alpha
    both = [_of_adapter(outer, layer.adapter_name) for outer in projections(found[1]).values()]
    if abs(both[0].scaling / both[1].scaling - 1) > 1e-12:
        raise ValueError(
            f"PEFT's format has one rank and one alpha for in_proj and out_proj of {found[0]}, and here their scalings "
            f"are {both[0].scaling} and {both[1].scaling}; give them the same alpha / rank"
        )
    larger = max(both, key=lambda one: one.rank)
    return found[0], larger.rank, larger.alpha


def _of_adapter(layer: Any, name: str) -> LowRankLayer:
    while layer.adapter_name != name:
        layer = layer.base
    return layer


def ranks_and_alphas(model: nn.Module, name: str) -> Iterator[tuple[str, LowRankLayer | LoRAExperts, int, float, str]]:
    """Each layer or parameter that an adapter adapts, by the name that the file has for it: layer, rank, alpha, and
    the layer's own name."""
    for path, layer in adapter_layers(model, name):
        if isinstance(layer, LoRAExperts):
            for parameter in layer.pairs:
                yield f"{path}.{parameter}", layer, layer.ranks[parameter], layer.alphas[parameter], path
        elif isinstance(layer, LowRankLayer):
            known_as, rank, alpha = settings_of(model, path, layer)
            yield known_as, layer, rank, alpha, path


# ===== parameters, above all stacked experts =====


def _expert_paths(path: str, module: nn.Module, adapted: Iterable[str]) -> dict[str, str]:
    """Where the pairs of a module's parameters stand in the file, by the parameter's name."""
    names = [name for name, _ in module.named_parameters(recurse=False) if name in adapted]
    return {name: PREFIX + path + ".base_layer" * depth for depth, name in enumerate(reversed(names))}


def _expert_tensors(path: str, layer: LoRAExperts) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, place in _expert_paths(path, layer.innermost, layer.ranks).items():
        pair: Any = layer.pairs[name]
        tensors[place + ".lora_A.weight"] = pair.lora_A.flatten(0, 1)  # [experts * rank, in]
        tensors[place + ".lora_B.weight"] = pair.lora_B.permute(1, 2, 0).flatten(1)  # [out, rank * experts]
        if isinstance(layer, DoRAExperts):
            tensors[place + ".lora_magnitude_vector"] = pair.magnitude  # [experts, out]
    return tensors


def fill_experts(path: str, layer: LoRAExperts, tensors: dict[str, Tensor]) -> None:
    """Sets the pairs of a module's parameters from a file's tensors."""
    for name, place in _expert_paths(path, layer.innermost, layer.ranks).items():
        pair: Any = layer.pairs[name]
        experts, out, rank = pair.lora_B.shape
        pair.lora_A.copy_(tensors[place + ".lora_A.weight"].view(pair.lora_A.shape))
        pair.lora_B.copy_(tensors[place + ".lora_B.weight"].view(out, rank, experts).permute(2, 0, 1))
        if isinstance(layer, DoRAExperts):
            pair.magnitude.copy_(tensors[place + ".lora_magnitude_vector"])


def adaptable_parameters(model: nn.Module) -> dict[str, str]:
    """Every parameter that `attach` could find by target_parameters -> its module's name."""
    stacks = named_stacks(model, (LowRankLayer, TrainedPart))
    return {f"{path}.{name}": path for path, _, own in stacks if path for name in own}


# ===== before anything is attached =====


def expected_tensors(model: nn.Module, config: LoRAConfig) -> dict[str, Tensor]:
    """Keys of the adapter that config would attach, with tensors of the right shapes and kinds (on the meta device)."""
    targets, saved = plan(model, config)
    split = splits(model, config, targets)
    stacks = plan_parameters(model, config, targets, saved)
    beside = parts_beside(model, config, "", targets, saved, stacks)
    dtype = config.adapter_dtype or torch.get_default_dtype()
    tensors: dict[str, Tensor] = {}
    owner = owners_of_tied(model, targets) if config.ensure_weight_tying else {}
    seen: set[nn.Module] = set()
    for path, module in (targets | saved).items():
        if module in seen:  # a module that stands in two places is stored for the first
            continue
        seen.add(module)
        if path in saved:
            tensors |= {f"{PREFIX}{path}.{key}": t.to("meta") for key, t in module.state_dict().items()}
            continue
        kind = layer_class(module, config.dora)
        if kind is DoRAEmbedding and path in {*owner, *owner.values()}:
            kind = TiedDoRAEmbedding
        key_A, key_B, magnitude = _endings(kind)
        rank = own_rank(model, config, owner.get(path, path), split)
        if found := packed_attention(model, path):
            rank = max(own_rank(model, config, f"{found[0]}.{which}", split) for which in ("in_proj", "out_proj"))
        shape_A, shape_B = kind.pair_shapes(module, rank)
        shapes = {key_A: shape_A, key_B: shape_B}
        if config.dora:
            shapes[magnitude] = _magnitude_shape(kind, shape_A, shape_B)
        if trains_bias(model, config.bias, path, module):
            shapes[BIAS] = tuple(module.bias.shape)  # type: ignore[arg-type]
        for ending, shape in shapes.items():
            tensors[place_of(model, path) + ending] = torch.empty(shape, dtype=dtype, device="meta")
    for path, (module, ranks, _) in stacks.items():
        if module not in seen:
            seen.add(module)
            inner: Any = module.innermost if isinstance(module, LoRAExperts) else module
            for name, place in _expert_paths(path, inner, ranks).items():
                transposed = getattr(inner, "is_transposed", False)
                experts, out, width = stacked_shape(inner.get_parameter(name), transposed)
                rank = ranks[name]
                tensors[place + ".lora_A.weight"] = torch.empty(experts * rank, width, dtype=dtype, device="meta")
                tensors[place + ".lora_B.weight"] = torch.empty(out, rank * experts, dtype=dtype, device="meta")
                if config.dora:
                    tensors[place + ".lora_magnitude_vector"] = torch.empty(experts, out, dtype=dtype, device="meta")
    for path, part in beside.items():
        if part not in seen:
            seen.add(part)
            tensors |= {key: tensor.to("meta") for key, tensor in part_tensors(path, part).items()}
    return tensors


def own_rank(model: nn.Module, config: LoRAConfig, path: str, split: Mapping[str, Split]) -> int:
    """The rank that `attach` would give to a layer."""
    if path in split:
        return sum(split[path].ranks.values())
    return layer_setting(model, config.rank_pattern, path, config.rank)
