"""phicore: LoRA, DoRA and NF4-QLoRA fine-tuning in PyTorch and Triton."""

from typing import TYPE_CHECKING

from phicore import nf4
from phicore.adapters import DoRALinear, LoRAConfig, LoRALinear, attach, disabled, merge, unmerge
from phicore.formats import pretrained as _pretrained  # noqa: F401  # what quantize_ does for models of transformers
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

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """__version__, looked up when it is asked for; of a checkout that is not installed it is unknown."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("phicore")
        except PackageNotFoundError:
            return "0+unknown"
