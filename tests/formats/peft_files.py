"""What tests of PEFT's format share."""

import json
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from phicore.adapters import adapter_layers
from phicore.formats.peft import CONFIG, WEIGHTS

IDS = torch.arange(1, 13).view(2, 6)


def load_in_peft(model: nn.Module, directory: Path):
    """PeftModel.from_pretrained, in which a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False).eval()


def kinds(model: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(layer)) for path, layer in adapter_layers(model)]


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def edit(directory: Path, **fields) -> None:
    config = json.loads((directory / CONFIG).read_text()) | fields
    (directory / CONFIG).write_text(json.dumps(config))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / WEIGHTS)
    save_file(change(tensors) or tensors, directory / WEIGHTS, metadata={"format": "pt"})


def assert_same_files(left: Path, right: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        assert (left / name).read_bytes() == (right / name).read_bytes()
