"""Spoiling files: any JSON value, and a model directory's weights written anew with a change."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from torch import Tensor

from phicore.formats.safetensors_files import INDEX, model_tensors, write_model

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def reshard(directory: Path, change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None) -> None:
    """Writes a directory's weights anew, changed, in files of at most 20 kB."""
    weights = model_tensors(directory)
    tensors = {key: file.read(key) for key, file in weights.items()}
    change(tensors)
    for path in {*(file.path for file in weights.values()), directory / INDEX}:
        path.unlink(missing_ok=True)
    write_model(({key: tensor.clone()} for key, tensor in tensors.items()), directory, 20_000)
