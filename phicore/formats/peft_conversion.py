"""Adapters that PEFT makes something else of.

Layers that it takes for a mixture's experts: on models whose experts transformers 5 stacked, it rewrites targets
of these names to the experts' parameters, wherever they stand, and drops the pairs of dense layers and shared experts.

PEFT does so to any target_modules (names, regular expressions, all-linear), so that no file can hold such pairs for it.

Convolutions with groups: its DoRA divides by the norm of W + scaling * B A, where it multiplies B and A as if there
were no groups, which is no weight of the layer (get_lora_weight of tuners/lora/dora.py in peft 0.21.2).

Convolutions that pad otherwise than with zeros, or are dilated: its A is a convolution that does neither (update_layer
of _ConvNd in tuners/lora/layer.py). Where that changes the output's length, as without padding="same", it raises.

Layers whose weight the code of their model reads, in place of calling them: it has the base's weight in PEFT, so that
the pair has no effect and does not train.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from phicore.adapters.lora import LowRankLayer
from phicore.formats.peft_keys import PREFIX

MODEL_TYPE = "phicore.model_type"
"""Key of the safetensors metadata under which `save_adapter` leaves the model's type where PEFT misreads it."""

PAST = "phicore.read_past"
"""Key of the safetensors metadata under which `save_adapter` leaves the names of `read_past`, one a line."""

# config.model_type by the family that they are converted as: _MODEL_TO_CONVERSION_PATTERN of conversion_mapping.py in
# transformers 5.23, with "mixtral", which peft adds.
_TYPES = {
    "mixtral": ("mixtral", "minimax", "minimax_m2"),
    "qwen2_moe": (
        "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe",
        "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe",
        "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker", "solar_open",
    ),
}  # fmt: skip
# Last names that are converted: _MOE_TARGET_MODULE_MAPPING of utils/transformers_weight_conversion.py in peft 0.21.2.
_NAMES = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}

CONVERTED = {model_type: _NAMES[family] for family, types in _TYPES.items() for model_type in types}
"""config.model_type -> last names of layers that PEFT takes for experts."""

# Classes of transformers 5.23 -> the layers in them whose weight they compute with.
READ_PAST = {
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), ("dt_proj",)),
    **dict.fromkeys(
        ("DetrMHAttentionMap", "ConditionalDetrMHAttentionMap", "MaskFormerDetrMHAttentionMap"), ("k_proj",)
    ),
    "DabDetrMHAttentionMap": ("k_linear",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def misread(model_type: str | None, layers: Iterable[str]) -> list[str]:
    """Those of an adapter's layers, by name, that PEFT misreads on a model of this type."""
    names = CONVERTED.get(model_type or "", ())
    return [layer for layer in layers if layer.rpartition(".")[2] in names]


def normed_otherwise(tensors: Mapping[str, Tensor]) -> list[str]:
    """The convolutions with groups that have DoRA, by name, among an adapter's tensors by PEFT's keys."""
    return [
        layer
        for layer in _convolutions(tensors)
        if f"{PREFIX}{layer}.lora_magnitude_vector" in tensors
        and tensors[f"{PREFIX}{layer}.lora_A.weight"].shape[0] != tensors[f"{PREFIX}{layer}.lora_B.weight"].shape[1]
    ]


def padded_otherwise(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The convolutions whose padding mode or dilation PEFT leaves out, without an error, by name, among an adapter's
    tensors by PEFT's keys; the model has the adapter, or is to get it."""
    found = []
    for path in _convolutions(tensors):
        module = model.get_submodule(path)
        layer: Any = module.innermost if isinstance(module, LowRankLayer) else module
        dilated = layer.padding == "same" and max(layer.dilation) > 1
        if any(layer._reversed_padding_repeated_twice) and (layer.padding_mode != "zeros" or dilated):
            found.append(path)
    return found


def read_past(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """The layers of READ_PAST, by name, among an adapter's tensors by PEFT's keys; a pair whose B is zero has no effect
    anywhere."""
    end = ".lora_B.weight"
    kinds = {path: type(module).__name__ for path, module in model.named_modules(remove_duplicate=False)}
    found = []
    for key, B in tensors.items():
        layer = key.removesuffix(end).removeprefix(PREFIX)
        parent, _, last = layer.rpartition(".")
        if key.endswith(end) and last in READ_PAST.get(kinds.get(parent, ""), ()) and B.any():
            found.append(layer)
    return found


def _convolutions(tensors: Mapping[str, Tensor]) -> list[str]:
    end = ".lora_A.weight"
    return [
        key.removesuffix(end).removeprefix(PREFIX) for key, A in tensors.items() if key.endswith(end) and A.dim() > 2
    ]
