"""phicore: LoRA, DoRA and NF4-QLoRA fine-tuning in pure PyTorch."""

from phicore import nf4
from phicore.adapters import DoRALinear, LoRAConfig, LoRALinear, attach, disabled, merge, unmerge
from phicore.formats.peft import load_adapter, save_adapter
from phicore.nf4 import NF4Linear, quantize_
from phicore.training import TrainConfig, Trainer
from phicore.zero import ZeroOptimizer

__all__ = [
    "DoRALinear",
    "LoRAConfig",
    "LoRALinear",
    "NF4Linear",
    "TrainConfig",
    "Trainer",
    "ZeroOptimizer",
    "attach",
    "disabled",
    "load_adapter",
    "merge",
    "nf4",
    "quantize_",
    "save_adapter",
    "unmerge",
]
