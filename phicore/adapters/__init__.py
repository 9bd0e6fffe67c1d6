"""LoRA and DoRA layers, and putting them into models."""

from phicore.adapters.attach import adapter_layers, attach, disabled, merge, unmerge
from phicore.adapters.config import LoRAConfig
from phicore.adapters.dora import DoRALinear
from phicore.adapters.lora import LoRALinear

__all__ = ["DoRALinear", "LoRAConfig", "LoRALinear", "adapter_layers", "attach", "disabled", "merge", "unmerge"]
