"""LoRA and DoRA over convolutions: A is a convolution with the base's geometry, B a 1 x 1 convolution behind it.

Shapes are PEFT's: A [rank, in_channels, *kernel], whatever the base's groups, and B [out_channels, rank / groups, 1,
...], grouped like the base. A group of B's outputs so reads a group of A's ranks, and these read all input channels.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from phicore.adapters import base as base_layer
from phicore.adapters.dora import DoRALayer
from phicore.adapters.lora import LowRankLayer
from phicore.products import matmul

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def convolve(layer: Any, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """x through kernels [out, in / groups, *kernel] with a layer's stride, padding, padding mode and dilation, without
    a bias: [N, in, *length] or [in, *length] -> [N, out, *length'] or [out, *length']."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    return _FUNCTIONS[weight.dim() - 2](x, weight, None, layer.stride, padding, layer.dilation, groups)


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """Grouped kernels as kernels over all channels, zero outside their group: [out, in / groups, *kernel] -> [out, in *
    kernel]."""
    out = weight.shape[0]
    if groups == 1:
        return weight.reshape(out, -1)
    blocks = weight.reshape(groups, out // groups, -1)  # [groups, out / groups, in / groups * kernel]
    wide = torch.diag_embed(blocks.movedim(0, -1))  # [out / groups, in / groups * kernel, groups, groups]
    return wide.permute(2, 0, 3, 1).reshape(out, -1)


class LowRankConvolution(LowRankLayer):
    """What LoRA and DoRA share over nn.Conv1d, nn.Conv2d and nn.Conv3d.

    Over grouped kernels a merged layer has none (groups=1): the adapter reads all channels, so its sum with the base
    does too. That layer is exact, and its weight `groups` times as large.
    """

    accepts = "nn.Conv1d, nn.Conv2d, nn.Conv3d or another adapter of one"

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        return isinstance(base, (*CONVOLUTIONS, LowRankConvolution))

    @classmethod
    def pair_shapes(cls, base: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        layer = base.innermost if isinstance(base, LowRankConvolution) else base
        if rank % layer.groups:
            raise ValueError(f"a convolution with groups={layer.groups} needs a rank that this divides, got {rank}")
        ones = (1,) * len(layer.kernel_size)
        return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank // layer.groups, *ones)

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.lora_A.reshape(self.rank, -1), ungrouped(self.lora_B, self.innermost.groups)

    def dense_base(self) -> Tensor:
        dtype = base_layer.accumulate_dtype(self.dtype)
        if isinstance(self.base, LowRankConvolution):
            return self.base.dense_weight(dtype)
        return ungrouped(self.innermost.weight.to(dtype), self.innermost.groups)

    def held_base(self) -> base_layer.Held:
        if isinstance(self.base, LowRankConvolution):
            return base_layer.held(self.dense_base())
        return base_layer.held(ungrouped(self.innermost.weight, self.innermost.groups))

    def project(self, x: Tensor) -> Tensor:
        """x through this layer, without the bias."""
        return self.updated(self.project_base(x), x, self._update)

    def project_base(self, x: Tensor) -> Tensor:
        """x through the base, without the bias. A base with hooks is called, so that they run."""
        if base_layer.has_hooks(self.base):
            y, bias = self.base(x), cast(Tensor | None, self.base.bias)
            return y if bias is None else y - self.per_channel(bias.to(y.dtype))
        if isinstance(self.base, LowRankConvolution):
            return self.base.project(x)
        layer = self.innermost
        return convolve(layer, x, layer.weight, layer.groups)

    def low_rank(self, x: Tensor) -> Tensor:
        """scaling * B(A(x)), shaped like the base's output."""
        layer = self.innermost
        x = functional.dropout(x, self.active_dropout, self.training)
        u = convolve(layer, x, self.lora_A.to(x.dtype), 1)  # [N, rank, *length']
        conv = _FUNCTIONS[self.lora_B.dim() - 2]
        return conv(u, self.factor * self.lora_B.to(x.dtype), groups=layer.groups)

    def per_channel(self, values: Tensor) -> Tensor:
        """[out] -> [out, 1, ...], which broadcasts over a convolution's output."""
        return values.view(-1, *(1,) * len(self.innermost.kernel_size))

    def laid_out(self, weight: Tensor) -> Tensor:
        layer = self.innermost
        if layer.groups > 1:
            raise ValueError(
                f"the weight of a convolution with groups={layer.groups} is read past its forward, and holds no "
                f"adapter, which reads all channels; leave the layer out of the adapter"
            )
        return weight.view(layer.weight.shape)

    def plain(self, weight: Tensor) -> nn.Module:
        layer = self.innermost
        shape = (layer.out_channels, layer.in_channels, *layer.kernel_size)
        merged = base_layer.with_weight(layer, weight.reshape(shape))
        merged.groups = 1
        return merged


class LoRAConvolution(LowRankConvolution):
    """A convolution with a LoRA adapter: y = base(x) + scaling * B(A(dropout(x))).

    Args:
        base: nn.Conv1d, nn.Conv2d, nn.Conv3d or another adapter of one; it is frozen.
        rank: channels between A and B; a multiple of the base's groups.
        alpha, dropout, rslora, init, dtype: as LoRALinear.

    Raises:
        TypeError: base is no convolution.
        ValueError: rank, alpha, dropout or init out of range, or a rank that groups does not divide.

    Example:
        >>> layer = LoRAConvolution(nn.Conv2d(8, 16, 3, padding=1), rank=4, alpha=8)
        >>> layer(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 16, 5, 5])
    """

    def forward(self, x: Tensor) -> Tensor:
        """x, float [N, in, *length] in the base's dtype, to [N, out, *length']."""
        return self.updated(self.through_base(x), x, self._update)

    def _update(self, y: Tensor, x: Tensor) -> Tensor:
        return y + self.low_rank(x)


class DoRAConvolution(DoRALayer, LowRankConvolution):
    """A convolution with a DoRA adapter: y = (m / ||V'||) * V'(x) + bias, one magnitude and norm an output channel.

    Args and errors: as LoRAConvolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x, float [N, in, *length] in the base's dtype, to [N, out, *length']."""
        if not self.enabled:
            return self.base(x)
        y = self.project(x)
        return y if self.bias is None else y + self.per_channel(self.bias.to(y.dtype))

    def _update(self, y: Tensor, x: Tensor) -> Tensor:
        v = y + self.low_rank(x)
        return self.weighed(y, (v * self.per_channel(self.scale(self._base_rows()))).to(v.dtype))

    @torch.no_grad()
    def _base_rows(self) -> Tensor:
        """W A^T, [out, rank], in W's dtype."""
        W = self.dense_base().to(self.dtype)  # [out, in * kernel]
        return matmul(W, self.lora_A.detach().reshape(self.rank, -1).to(W.dtype).t())
