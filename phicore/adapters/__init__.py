"""LoRA and DoRA layers, and putting them into models."""

from phicore.adapters.attach import attach
from phicore.adapters.config import LoRAConfig
from phicore.adapters.convolution import DoRAConvolution, LoRAConvolution
from phicore.adapters.dora import DoRALinear
from phicore.adapters.embedding import DoRAEmbedding, LoRAEmbedding
from phicore.adapters.experts import DoRAExperts, LoRAExperts
from phicore.adapters.fused import FusedDoRALinear, FusedLoRALinear
from phicore.adapters.layers import adapter_layers
from phicore.adapters.lora import LoRALinear
from phicore.adapters.lora_plus import lora_plus_groups
from phicore.adapters.merging import merge, unmerge
from phicore.adapters.switch import activate, disabled, mixed

__all__ = [
    "DoRAConvolution",
    "DoRAEmbedding",
    "DoRAExperts",
    "DoRALinear",
    "FusedDoRALinear",
    "FusedLoRALinear",
    "LoRAConfig",
    "LoRAConvolution",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALinear",
    "activate",
    "adapter_layers",
    "attach",
    "disabled",
    "lora_plus_groups",
    "merge",
    "mixed",
    "unmerge",
]
