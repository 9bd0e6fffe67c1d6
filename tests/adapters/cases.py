"""What the dense-formula tests of LoRA and DoRA draw from: odd shapes, no rows, alpha != rank, strided inputs."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def dense_cases(kinds: tuple[str, ...]):
    """given(...) of base kind, leading dimensions, sizes, scaling, bias and strides."""
    return given(
        kind=st.sampled_from(kinds),
        lead=st.sampled_from(((), (1,), (5,), (0,), (2, 3), (2, 0, 3))),
        out=st.integers(1, 24),
        inner=st.integers(1, 40),
        rank=st.integers(1, 9),
        alpha=st.sampled_from((0.5, 8, 13.0)),
        rslora=st.booleans(),
        bias=st.booleans(),
        strided=st.booleans(),
    )


def leaf(lead: tuple[int, ...], inner: int, strided: bool) -> Tensor:
    """An input [*lead, inner] in float64 that requires a gradient."""
    x = torch.randn(inner, *lead, dtype=torch.float64).movedim(0, -1)
    return (x if strided else x.contiguous()).detach().requires_grad_(True)
