"""LoRA and DoRA over an embedding, seen as a linear layer of one-hot rows: W [out, in] is the table transposed."""

from typing import Any

import torch
from torch import Tensor, nn

from phicore.adapters import base as base_layer
from phicore.adapters.dora import DoRALayer
from phicore.adapters.lora import LowRankLayer
from phicore.adapters.scaled_rows import scaled_rows
from phicore.adapters.update import add_product
from phicore.products import matmul


def check_lookup(table: nn.Embedding) -> None:
    """Raises ValueError for an embedding that may do more than look up rows of its table and scale them (by
    embed_scale, as transformers has it)."""
    if table.max_norm is not None:
        raise ValueError(
            f"an embedding with max_norm={table.max_norm} rewrites its own table in each forward pass and cannot be "
            f"frozen; set max_norm=None, or leave it out of the adapter"
        )
    if type(table).forward is not nn.Embedding.forward and not hasattr(table, "embed_scale"):
        raise ValueError(
            f"{type(table).__name__} has a forward of its own, which may do more than look up rows (Inkling's "
            f"normalises them), so that an adapter of its table would be wrong; leave it out of target_modules and "
            f"trainable_token_indices, or train it whole (modules_to_save)"
        )


class LowRankEmbedding(LowRankLayer):
    """What LoRA and DoRA share over embeddings.

    lora_A is [rank, num_embeddings], lora_B [embedding_dim, rank]. There is no dropout: a token is no float. What the
    base says of gradients of rows holds for A's columns: that of padding_idx gets none, and scale_grad_by_freq divides
    them by how often a token occurs; they are dense all the same (sparse=True). A scale that the base puts on its
    output (Gemma's embed_scale) is put on the adapter's too.
    """

    accepts = "nn.Embedding or another adapter of one"

    def _complete(self) -> None:
        super()._complete()
        table: Any = self.innermost
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx

    @classmethod
    def fits(cls, base: nn.Module) -> bool:
        return isinstance(base, (nn.Embedding, LowRankEmbedding))

    @classmethod
    def pair_shapes(cls, base: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        check_lookup(base.innermost if isinstance(base, LowRankEmbedding) else base)
        return (rank, base.num_embeddings), (base.embedding_dim, rank)

    def low_rank_lookup(self, y: Tensor, tokens: Tensor) -> Tensor:
        """y + the base's output scale * scaling * (A^T)[tokens] B^T: [..., dim], int64 [...] -> [..., dim]."""
        by_freq = self.innermost.scale_grad_by_freq
        # [..., rank]
        u = nn.functional.embedding(tokens, self.lora_A.t(), self.padding_idx, scale_grad_by_freq=by_freq)
        factor = getattr(self.innermost, "embed_scale", None)
        if factor is not None:
            u = u * factor
        with base_layer.without_autocast(y.device):  # a lookup keeps its dtype there, and so does what is added to it
            return add_product(y, u.to(y.dtype), self.lora_B, self.factor)

    def laid_out(self, weight: Tensor) -> Tensor:
        return weight.t()


class LoRAEmbedding(LowRankEmbedding):
    """An embedding with a LoRA adapter: y = base(t) + scaling * (A^T)[t] B^T.

    Args:
        base: nn.Embedding or another adapter of one; it is frozen.
        rank, alpha, rslora, init, dtype: as LoRALinear.
        dropout: has no effect.

    Raises:
        TypeError: base is no embedding.
        ValueError: rank, alpha or init out of range, or a base with max_norm or a forward of its own.

    Example:
        >>> layer = LoRAEmbedding(nn.Embedding(100, 32), rank=4, alpha=8)
        >>> layer(torch.tensor([3, 5])).shape
        torch.Size([2, 32])
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., dim] in the base's dtype."""
        return self.updated(self.base(tokens), tokens, self.low_rank_lookup)


class DoRAEmbedding(DoRALayer, LowRankEmbedding):
    """An embedding with a DoRA adapter: y = (m / ||V'||) * (V'^T)[t], V' = W + scaling * B A [dim, num_embeddings].

    One magnitude and one norm an embedding dimension, taken over the whole vocabulary, as PEFT has it.

    Args and errors: as LoRAEmbedding.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., dim] in the base's dtype."""
        return self.updated(self.base(tokens), tokens, self._update)

    def _update(self, y: Tensor, tokens: Tensor) -> Tensor:
        v = self.low_rank_lookup(y, tokens)
        return self.weighed(y, scaled_rows(v, self.scale(self._base_rows())))

    @torch.no_grad()
    def _base_rows(self) -> Tensor:
        """W A^T, [dim, rank], in W's dtype."""
        W = base_layer.dense_weight(self.base, self.dtype)  # [dim, num]
        return matmul(W, self.lora_A.detach().to(W.dtype).t())
