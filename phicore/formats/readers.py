"""The programs that read PEFT's format: what each of them takes of an adapter, and what can be done about the rest.

Each entry was read from the program's own source, which a comment names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Target: TypeAlias = Literal["vllm", "tgi", "llama.cpp", "kaito", "transformers"]

MERGE = "merge the adapter into its model (phicore export --merge --model DIR), and serve that"
MERGE_BY_PEFT = "merge the adapter into its model with peft (merge_and_unload), and serve that"
# What an adapter can have that some reader does not take -> what to do about it, and whether `export` does it.
REMEDIES = {
    "missing": ("export writes it", True),
    "fields": ("export leaves them out", True),
    "tables": ("export leaves it out: serve the base that the adapter was trained on, which holds it", True),
    "use_rslora": ("export writes lora_alpha * sqrt(r) instead", True),
    "rank_pattern": ("export fills every layer up to the highest rank with zeros", True),
    "alpha_pattern": ("export multiplies lora_B instead", True),
    "padded rank": ("export pads A and B with zeros, and lora_alpha in proportion", True),
    "rank": ("set it so and say that here with max_rank (--max-rank), or train at a lower rank", False),
    "use_dora": (MERGE, False),
    "modules_to_save": (MERGE, False),
    "bias": (MERGE, False),
    "lora_bias": (MERGE_BY_PEFT, False),  # which phicore does not load
    "tokens": (MERGE, False),
    "embedding": (MERGE, False),
    "convolution": (MERGE, False),
    "attention": (MERGE_BY_PEFT, False),
    "parameters": (MERGE, False),
    "fan_in_fan_out": (MERGE, False),
    "init_lora_weights": ("convert it to a plain LoRA with peft (path_initial_model_for_weight_conversion)", False),
    "other settings": ("train without them", False),
    "layers": (MERGE, False),
    "blocks": ("adapt these layers in every block, or " + MERGE, False),
}
SCALING = {"use_rslora", "rank_pattern", "alpha_pattern", "padded rank"}

_OF_PEFT_0_11 = frozenset({
    "auto_mapping", "base_model_name_or_path", "revision", "peft_type", "task_type", "inference_mode", "r",
    "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
    "megatron_core", "loftq_config", "use_dora", "layer_replication",
})  # fmt: skip
_ONE_SCALING = "it takes one scaling, from r and lora_alpha, for all layers"
_UNKNOWN = {
    "tables": "it leaves tables of embeddings unused without a word",
    "convolution": "it adapts linear layers only",
    "attention": "it knows no weights of nn.MultiheadAttention",
    "fan_in_fan_out": "it adapts linear layers only, no Conv1D of transformers",
    "parameters": "it takes no pairs of parameters, such as stacked experts, by PEFT's keys",
    "tokens": "it knows no rows of an embedding that are trained",
    "init_lora_weights": "this start changed the base's weights too, and only peft repeats that when it loads",
    "other settings": "it does not know them",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """A program that reads PEFT's format."""

    unread: Mapping[str, str] = field(default_factory=dict)
    """Which of REMEDIES it does not take -> what it does then. Empty: it reads all that PEFT writes."""

    required: tuple[str, ...] = ()
    """Fields that adapter_config.json must have."""

    fields: frozenset[str] | None = None
    """Those that it may have; None for any."""

    heads: tuple[str, ...] = ()
    """Entries of modules_to_save that it takes all the same, each a single layer."""

    max_rank: int | None = None
    """The highest rank that it takes unless it is set otherwise."""

    rank_settings: tuple[int, ...] = ()
    """Highest ranks that it can be set to."""

    pads_ranks: bool = False
    """Whether it pads ranks to 8 or a multiple of 16 before it has scaled all layers (to 8 for each GPU, where a model
    is spread over several: what is exported is for one)."""

    layers: str = ".*"
    """Regular expression of the names of the layers that it looks for."""

    every_block: bool = False
    """Whether it drops a kind of layer that is not adapted in each block."""


READERS: dict[Target, Reader] = {
    # vllm/lora/peft_helper.py, lora_model.py, utils.py of 0.33.0; --max-lora-rank
    "vllm": Reader(
        unread=_UNKNOWN
        | {
            "use_dora": "it raises on DoRA",
            "modules_to_save": "it takes none but the classifier or score of a classification model, if a single layer",
            "bias": "it takes no biases",
            "lora_bias": "it takes no biases",
            "parameters": "it takes pairs of stacked experts for some models only, if the request says so",
            "rank_pattern": f"before release 0.33 {_ONE_SCALING}",
            "alpha_pattern": f"before release 0.33 {_ONE_SCALING}",
        },
        heads=("classifier", "score"),
        required=("r", "lora_alpha", "target_modules"),
        max_rank=16,
        rank_settings=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    ),
    # text-generation-inference: server/text_generation_server/adapters/lora.py, utils/adapter.py, models/__init__.py,
    # whose list of layers lacks the lm_head that adapter.py looks up
    "tgi": Reader(
        unread=_UNKNOWN
        | {
            "use_dora": "it has no DoRA and leaves the magnitudes unused without a word",
            "modules_to_save": "it leaves all but A and B unused without a word",
            "bias": "it leaves all but A and B unused without a word",
            "lora_bias": "it leaves all but A and B unused without a word",
            "embedding": "it leaves the weights of embeddings unused without a word",
            "rank_pattern": _ONE_SCALING,
            "alpha_pattern": _ONE_SCALING,
        },
        pads_ranks=True,
        layers=r"model\.layers\.\d+\.(self_attn\.(q|k|v|qkv|o)_proj|mlp\.((gate|up|down|c)_proj|c_fc))",
        every_block=True,
    ),
    # llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.cpp; the rank that it divides by is the tensor's own
    "llama.cpp": Reader(
        unread=_UNKNOWN
        | {
            "use_rslora": "its scaling is lora_alpha / rank whatever use_rslora says",
            "use_dora": "its converter stops at a magnitude",
            "modules_to_save": "its converter stops at tensors that are neither A nor B, but for norms, which are lost",
            "bias": "its converter stops at a tensor that is neither A nor B",
            "lora_bias": "its converter stops at a tensor that is neither A nor B",
            "alpha_pattern": "it knows one lora_alpha for all layers",
        },
        required=("lora_alpha",),
    ),
    # kaito: presets/workspace/inference, whose transformers runtime makes one adapter of all (add_weighted_adapter) and
    # whose other runtime is vLLM: an adapter must suit both. Its dependencies/requirements.txt has vllm 0.25.1 and peft
    # 0.11.1, whose LoraConfig raises on a field of later releases, null or not.
    "kaito": Reader(
        unread=_UNKNOWN
        | {
            "tables": "its vLLM runtime leaves tables of embeddings unused without a word",
            "use_rslora": "its transformers runtime scales the recombined adapter by sqrt(r) once more",
            "use_dora": "its transformers runtime recombines A and B without the magnitudes, its vLLM runtime raises",
            "modules_to_save": "its transformers runtime drops them, its vLLM runtime raises",
            "bias": "its transformers runtime drops them, its vLLM runtime raises",
            "lora_bias": "its transformers runtime drops them, its vLLM runtime raises",
            "rank_pattern": "its vLLM runtime takes one scaling, from r and lora_alpha, for all layers",
            "alpha_pattern": "its vLLM runtime takes one scaling, from r and lora_alpha, for all layers",
        },
        required=("r", "lora_alpha", "target_modules"),
        fields=_OF_PEFT_0_11,
        max_rank=16,
        rank_settings=(1, 8, 16, 32, 64, 128, 256, 320, 512),
    ),
    # transformers reads adapters with peft itself
    "transformers": Reader(),
}
