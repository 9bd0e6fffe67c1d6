"""Rows of an embedding that train while the others stay frozen: new or rare tokens, at rows x dim of memory.

The rows are values, not differences, as in PEFT's TrainableTokens. What is tied to the table follows: a head's logits
of these tokens come from the trained rows too.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phicore.adapters import base as base_layer
from phicore.adapters.embedding import LowRankEmbedding, check_lookup
from phicore.adapters.layers import adapter_around
from phicore.adapters.lora import LowRankLayer, Rows, updated_rows
from phicore.adapters.trained import TrainedPart
from phicore.modules import has_own_forward, matches, no_match, stands_in


class TrainedRows(TrainedPart):
    """An embedding, or a linear layer that reads the same table, of whose weight some rows train.

    Args:
        base: nn.Embedding or nn.Linear, which `attach` freezes.
        adapter_name: which adapter of the model it belongs to.
        token_indices: the rows, each once.
        trained: their values [k, dim], shared with another module of the same table; None makes them, from the table.
        dtype: of the values made; None takes the table's.

    Attributes:
        trained: the rows' values, [k, dim].
        token_indices: int64 [k], in the order of the values.
        rows: the rows of a batch in which the values stand; None for all.
        owner: whether the values were made here, so that a file holds them under this module's name.

    Raises:
        ValueError: an index beyond the table, or an embedding with max_norm, scale_grad_by_freq or a forward of its
            own.
    """

    what = "trained in some rows"
    token_indices: Tensor

    def __init__(
        self,
        base: Any,
        adapter_name: str,
        token_indices: Sequence[int],
        trained: nn.Parameter | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base, adapter_name)
        table: Tensor = base.weight  # [num, dim]
        if max(token_indices) >= table.shape[0]:
            raise ValueError(f"token index {max(token_indices)} is beyond the {table.shape[0]} rows of the table")
        if isinstance(base, nn.Embedding):
            check_lookup(base)
            if base.scale_grad_by_freq:
                raise ValueError(
                    "an embedding with scale_grad_by_freq=True divides the gradient of a row by how often its token "
                    "occurs, which rows that train alone do not; set it to False"
                )
        self.register_buffer("token_indices", torch.tensor(token_indices, device=table.device))
        self.rows: Rows | None = None
        self.owner = trained is None
        if trained is None:
            trained = nn.Parameter(table.detach()[self.token_indices].to(dtype or table.dtype))
        self.trained = trained
        padding = getattr(base, "padding_idx", None)
        self.padding_slot = token_indices.index(padding) if padding in token_indices else None

    @property
    def weight(self) -> Tensor:
        """The whole table with the trained rows in it, a copy: for code that reads a weight past its layer."""
        table: Tensor = self.base.weight  # type: ignore[assignment]
        return table.index_copy(0, self.token_indices, self.trained.to(table.dtype)) if self.enabled else table

    def forward(self, x: Tensor) -> Tensor:  # int64 [...] -> [..., dim], or [..., dim] -> [..., num] of a head
        y = self.base(x)
        if not self.enabled:
            return y
        update = self._looked_up if isinstance(self.base, nn.Embedding) else self._projected
        return update(y, x) if self.rows is None else updated_rows(self.rows, y, x, update)

    def _looked_up(self, y: Tensor, tokens: Tensor) -> Tensor:
        order = self.token_indices.argsort()
        at = torch.searchsorted(self.token_indices[order], tokens.to(torch.int64))
        slot = order[at.clamp(max=order.shape[0] - 1)]  # [...], of the row that the token would have
        rows = nn.functional.embedding(slot, self.trained.to(y.dtype), self.padding_slot)
        factor = getattr(self.base, "embed_scale", None)
        if factor is not None:
            rows = rows * factor
        return torch.where((self.token_indices[slot] == tokens).unsqueeze(-1), rows.to(y.dtype), y)

    def _projected(self, y: Tensor, x: Tensor) -> Tensor:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        chosen = None if bias is None else bias[self.token_indices]
        z = nn.functional.linear(x, self.trained.to(x.dtype), chosen)  # [..., k]
        y = y.clone() if base_layer.has_hooks(self.base) else y  # else the base's output is nobody else's
        return y.index_copy_(-1, self.token_indices, z.to(y.dtype))

    def merged(self, shared: dict[int, nn.Parameter]) -> nn.Module:
        key = id(self.base.weight)
        if key not in shared:
            shared[key] = nn.Parameter(self.weight.detach().clone(), requires_grad=False)
        return base_layer.with_parameter(self.base, "weight", shared[key])

    def extra_repr(self) -> str:
        return f"tokens={len(self.token_indices)}, adapter_name={self.adapter_name!r}"


def token_rows(
    model: nn.Module,
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None,
    name: str,
    dtype: torch.dtype | None,
    taken: Collection[str],
) -> dict[str, TrainedPart]:
    """The layers with trained rows that an adapter would put into a model, by the names of their places.

    Args:
        model: the model, not changed yet.
        trainable_token_indices: as in LoRAConfig.
        name: of the adapter.
        dtype: of the trained rows; None takes the table's.
        taken: names of the modules in which the adapter does something else.

    Raises:
        ValueError: a name that is no embedding, an index beyond a table, different tokens for tied tables, a table that
            is also adapted or trained whole.
    """
    if trainable_token_indices is None:
        return {}
    every = dict(model.named_modules(remove_duplicate=False))
    made: dict[nn.Module, TrainedRows] = {}
    rows: dict[int, TrainedRows] = {}  # by the table
    for path, indices in _named(model, trainable_token_indices, every).items():
        _check_kind(path, every[path])
        table = every[path].weight
        if id(table) in rows and rows[id(table)].token_indices.tolist() != list(indices):
            raise ValueError(f"trainable_token_indices: {path} shares its table with another, which has other tokens")
        for module in (every[path], *every.values()):  # first the one that is named
            if getattr(module, "weight", None) is not table or isinstance(module, LowRankLayer | TrainedPart):
                continue
            _check_kind(path, module)
            if module not in made:
                first = rows.get(id(table))
                made[module] = TrainedRows(module, name, list(indices), first.trained if first else None, dtype)
                rows.setdefault(id(table), made[module])
    places = {path: made[module] for path, module in every.items() if module in made}
    for path in places:
        if stands_in(path, taken) or adapter_around(path, every):
            raise ValueError(
                f"trainable_token_indices means rows of {path}, which is adapted, trained whole or trained in its "
                f"bias, or stands in a module that is; leave it out of the one or the other"
            )
    return dict(places)


def _named(
    model: nn.Module, indices: Sequence[int] | Mapping[str, Sequence[int]], every: Mapping[str, nn.Module]
) -> dict[str, Sequence[int]]:
    """Names of embeddings (or linear layers) -> tokens."""
    if not isinstance(indices, Mapping):
        return {input_embedding(model, every): indices}
    named: dict[str, Sequence[int]] = {}
    for key, tokens in indices.items():
        found = [path for path in every if matches(path, [key])]
        if not found:
            raise ValueError(no_match(f'trainable_token_indices entry "{key}"', key, dict(every)))
        named |= dict.fromkeys(found, tokens)
    return named


def input_embedding(model: nn.Module, every: Mapping[str, nn.Module]) -> str:
    """The name of the embedding that a list of tokens means: what get_input_embeddings returns, or the only one.

    Raises:
        ValueError: there is none, or several.
    """
    method = getattr(model, "get_input_embeddings", None)
    try:
        module = method() if callable(method) else None
    except NotImplementedError:  # of transformers, for a model that it finds none in
        module = None
    adapted = LowRankLayer | TrainedPart
    found = [
        path
        for path, layer in every.items()
        if (layer is module if module is not None else isinstance(layer, nn.Embedding | TrainedRows | LowRankEmbedding))
        and not isinstance(every[path.rpartition(".")[0]], adapted)
    ]
    if module is None and len({every[path] for path in found}) != 1:
        raise ValueError(
            f"{type(model).__name__} does not say which embedding is its input's; give trainable_token_indices as a "
            f"dictionary from a name to tokens; there are: {', '.join(found[:10]) or 'no embeddings'}"
        )
    return found[0]


def _check_kind(path: str, module: nn.Module) -> None:
    if isinstance(module, LowRankLayer | TrainedPart):
        raise ValueError(f"trainable_token_indices means rows of {path}, which has an adapter already")
    if not isinstance(module, nn.Embedding | nn.Linear) or has_own_forward(module):
        raise ValueError(
            f"trainable_token_indices means rows of {path}, whose table is a {type(module).__name__}'s; only those of "
            f"nn.Embedding and nn.Linear, and of no linear layer with a forward of its own, can train"
        )


def owners(parts: Collection[tuple[str, Any]]) -> dict[str, list[int]]:
    """Names of the modules under which trained rows are filed -> their tokens, of (name, layer) pairs."""
    return {path: part.token_indices.tolist() for path, part in parts if isinstance(part, TrainedRows) and part.owner}
