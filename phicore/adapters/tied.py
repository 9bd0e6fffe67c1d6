"""One adapter for an embedding and the heads that read its table: they stay tied, trained and merged as one.

The embedding's table is W [num, dim], its pair A [rank, num] and B [dim, rank], and W' = W + scaling * (B A)^T. A tied
head computes x W'^T = x W^T + scaling * (x B) A: the embedding's own pair, transposed. With DoRA, W' = m V' / ||V'||
has one norm and one magnitude for each row of the table, for both.
"""

from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from phicore.adapters import base as base_layer
from phicore.adapters.config import LoRAConfig, pattern_value
from phicore.adapters.dora import DoRALayer, DoRALinear
from phicore.adapters.dora_norm import row_scale
from phicore.adapters.embedding import LowRankEmbedding
from phicore.adapters.lora import LoRALinear, LowRankLayer, LowRankLinear, Options
from phicore.modules import stands_in, within


class TiedHead(LowRankLinear):
    """A head adapted by the pair of the embedding whose table it reads; with LoRALinear or DoRALinear behind it.

    Args:
        base: an nn.Linear with the embedding's table as its weight, or another adapter of one; it is frozen.
        embedding: the adapted embedding.
        dropout: probability of zeroing an input of the head's low-rank path while training.

    Attributes:
        embedding_A, embedding_B: the embedding's lora_A and lora_B, the very parameters.
    """

    def __init__(self, base: nn.Module, embedding: LowRankEmbedding, dropout: float = 0.0) -> None:
        self._shared = (embedding,)  # for _make_pair; in a tuple, which nn.Module does not register
        options: Options = {"rslora": embedding.rslora, "init": embedding.init}
        super().__init__(base, embedding.rank, embedding.alpha, dropout, **options)
        del self._shared
        self.adapter_name = embedding.adapter_name

    def _make_pair(self, base: nn.Module, where: dict[str, Any]) -> None:
        self.embedding_A, self.embedding_B = self._shared[0].lora_A, self._shared[0].lora_B

    def reset_parameters(self) -> None:
        """Does nothing: the embedding starts the pair."""

    @property
    def lora_A(self) -> Tensor:  # type: ignore[override]
        """[rank, dim], a view of the embedding's B."""
        return self.embedding_B.t()

    @property
    def lora_B(self) -> Tensor:  # type: ignore[override]
        """[num, rank], a view of the embedding's A."""
        return self.embedding_A.t()


class TiedLoRAHead(TiedHead, LoRALinear):
    """y = x W'^T with W' = W + scaling * (B A)^T of the embedding; see TiedHead."""


class TiedDoRAHead(TiedHead, DoRALinear):
    """The same with W' of a TiedDoRAEmbedding.

    Attributes:
        embedding_magnitude: the embedding's magnitude, the very parameter.
    """

    def _make_magnitude(self, out: int) -> None:
        self.embedding_magnitude = cast(TiedDoRAEmbedding, self._shared[0]).magnitude

    def reset_parameters(self) -> None:
        """Starts nothing, since the embedding does; sums ||W||^2."""
        self.refresh_base_norm()

    @property
    def magnitude(self) -> Tensor:  # type: ignore[override]
        """m, [num]."""
        return self.embedding_magnitude


class TiedDoRAEmbedding(DoRALayer, LowRankEmbedding):
    """An embedding with a DoRA adapter that its head shares: y = m[t] * V'[t] / ||V'[t]||, V' = W + scaling * (B A)^T
    [num, dim].

    One magnitude and one norm a token, since the rows of the head's weight are the tokens. (DoRAEmbedding, which
    stands alone, has one a dimension, as PEFT has it.) The norms are those of the rows that are looked up.

    Args and errors: as LoRAEmbedding.

    Attributes:
        magnitude: m, [num_embeddings]; starts at ||W||.
    """

    norm_dim = 0

    def _complete(self) -> None:
        super()._complete()
        self.base_norm_squared = None  # type: ignore[assignment]  # which nothing reads

    def _make_magnitude(self, out: int) -> None:
        self.magnitude = nn.Parameter(self.lora_A.new_empty(self.lora_A.shape[1]))

    def refresh_base_norm(self) -> None:
        """Does nothing: no norm is kept."""

    def forward(self, tokens: Tensor) -> Tensor:  # int64 [...] -> [..., dim]
        return self.updated(self.base(tokens), tokens, self._update)

    def _update(self, y: Tensor, tokens: Tensor) -> Tensor:
        v = self.low_rank_lookup(y, tokens)  # V'[t], times the scale that the base puts on its output
        norm = torch.linalg.vector_norm(v.detach(), dim=-1, dtype=base_layer.accumulate_dtype(v.dtype))  # [...]
        by_freq = self.innermost.scale_grad_by_freq
        m = functional.embedding(tokens, self.magnitude[:, None], self.padding_idx, scale_grad_by_freq=by_freq)
        m = m.squeeze(-1).to(norm.dtype)  # [..., 1] -> [...]
        factor = getattr(self.innermost, "embed_scale", None)
        scale = row_scale(m if factor is None else m * factor, norm)
        return self.weighed(y, (v * scale.unsqueeze(-1)).to(v.dtype))


def tied_head(base: nn.Module, embedding: LowRankEmbedding, dropout: float) -> TiedHead:
    """The head that goes with an adapted embedding, LoRA or DoRA."""
    kind = TiedDoRAHead if isinstance(embedding, TiedDoRAEmbedding) else TiedLoRAHead
    return kind(base, embedding, dropout)


def tied_embedding(base: nn.Module, owner: LowRankEmbedding) -> LowRankEmbedding:
    """The adapter of another embedding with the table of an adapted one."""
    options: Options = {"rslora": owner.rslora, "init": owner.init}
    layer = type(owner)(base, owner.rank, owner.alpha, owner.dropout, **options)
    layer.lora_A, layer.lora_B, layer.adapter_name = owner.lora_A, owner.lora_B, owner.adapter_name
    if isinstance(layer, TiedDoRAEmbedding):
        layer.magnitude = cast(TiedDoRAEmbedding, owner).magnitude
    return layer


def shared_pair(layer: nn.Module) -> nn.Parameter | None:
    """A of the pair that a layer may have together with others: of an embedding, or a head that takes its."""
    if isinstance(layer, TiedHead):
        return layer.embedding_A
    return layer.lora_A if isinstance(layer, LowRankEmbedding) else None


def same_table(layer: Any, other: Any) -> bool:
    """Whether two adapted layers amount to one table, so that it can be merged once: the same pairs over one weight."""
    while isinstance(layer, LowRankLayer) and isinstance(other, LowRankLayer):
        pair = shared_pair(layer)
        if (
            pair is None
            or pair is not shared_pair(other)
            or (layer.enabled, layer.strength) != (other.enabled, other.strength)
        ):
            return False
        layer, other = layer.base, other.base
    if isinstance(layer, LowRankLayer) or isinstance(other, LowRankLayer):
        return False
    return _reads_table(layer) and layer.weight is getattr(other, "weight", None)


def owners_of_tied(model: nn.Module, targets: Mapping[str, nn.Module]) -> dict[str, str]:
    """Names of targets that take another's pair -> the name of the embedding that owns it, the first of its table."""
    owners: dict[str, str] = {}
    for places in tied_tables(model).values():
        first = next(path for path, module in places.items() if LowRankEmbedding.fits(module))
        owners |= {path: first for path in places if path in targets and places[path] is not places[first]}
    return owners


def check_same_settings(owners: Mapping[str, str], config: LoRAConfig) -> None:
    """Raises ValueError for a pattern that gives a layer that takes another's pair a rank or an alpha that is not its.

    Args:
        owners: of `owners_of_tied`.
        config: holds the patterns.
    """
    for what, pattern, default in (
        ("rank_pattern", config.rank_pattern, config.rank),
        ("alpha_pattern", config.alpha_pattern, config.alpha),
    ):
        for path, owner in owners.items():
            here = pattern_value(pattern, owner, default)
            if (own := pattern_value(pattern, path, here)) != here:
                raise ValueError(
                    f"ensure_weight_tying: {path} takes the pair of {owner}, and {what} says {own} of it, where that "
                    f"has {here}; say the same of both, or of {owner} alone"
                )


def add_tied(
    model: nn.Module, targets: Mapping[str, nn.Module], excluded: Collection[str], saved: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The targets with what is tied to them: all embeddings and linear layers that read one table.

    Args:
        model: the model, not changed yet.
        targets: the layers that target_modules means.
        excluded: names and suffixes of exclude_modules, of containers too.
        saved: modules that are trained whole.

    Raises:
        ValueError: no target is tied to anything, or what is tied is excluded or trained whole.
    """
    tables = tied_tables(model)
    meant = {id(_plain(module).weight) for module in targets.values() if _reads_table(module)} & tables.keys()
    if not meant:
        there = sorted({path for places in tables.values() for path in places})
        raise ValueError(
            "ensure_weight_tying: target_modules means no embedding and no head that are tied; "
            + (f"tied are {', '.join(there)}" if there else f"{type(model).__name__} ties none")
        )
    places = {path: module for table in meant for path, module in tables[table].items()}
    for path in places:
        trained_whole = stands_in(path, saved)
        if trained_whole or within(path, list(excluded)):
            raise ValueError(
                f"ensure_weight_tying: {path} is tied to a target, but is "
                f"{'trained whole (modules_to_save)' if trained_whole else 'excluded'}"
            )
    together = dict(targets) | places
    order = {path: place for place, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return dict(sorted(together.items(), key=lambda item: order[item[0]]))


def tied_tables(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """Tables that an embedding shares with another layer: id of the parameter -> the layers by their names, outermost
    adapters for adapted ones."""
    tables: dict[int, dict[str, nn.Module]] = {}
    every = dict(model.named_modules(remove_duplicate=False))
    for path, module in every.items():
        if _reads_table(module) and not isinstance(every[path.rpartition(".")[0]], LowRankLayer):
            tables.setdefault(id(_plain(module).weight), {})[path] = module
    return {
        table: places
        for table, places in tables.items()
        if len(set(places.values())) > 1 and any(isinstance(_plain(m), nn.Embedding) for m in places.values())
    }


def untied(model: nn.Module, targets: Collection[str], saved: Collection[str]) -> list[tuple[list[str], list[str]]]:
    """For each table that layers of a model share, their names and those of the layers that would each have a weight of
    their own, being adapted (targets) or trained whole (saved, or in one of them); without tables of which none would.
    """
    found = []
    for places in tied_tables(model).values():
        if alone := [path for path in places if path in targets or stands_in(path, saved)]:
            found.append((list(places), alone))
    return found


def keep_ties(model: nn.Module) -> None:
    """Has load_state_dict(assign=True) of a model, which gives each place a parameter of its own, tie again what was
    one: else a head and its embedding would train apart."""
    model.register_load_state_dict_pre_hook(_note_ties)
    model.register_load_state_dict_post_hook(_tie_again)


def _note_ties(model: nn.Module, _state: Any, _prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    if not metadata.get("assign_to_params_buffers"):
        return
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((module, name))
    model.__dict__["_ties"] = [(parameter, shared) for parameter, shared in places.items() if len(shared) > 1]


def _tie_again(model: nn.Module, _keys: Any) -> None:
    for before, shared in model.__dict__.pop("_ties", ()):
        loaded = [p for module, name in shared if (p := getattr(module, name)) is not before]
        for module, name in shared if loaded else ():
            setattr(module, name, loaded[-1])  # the last, as where each is copied into the one


def _plain(module: Any) -> Any:
    return module.innermost if isinstance(module, LowRankLayer) else module


def _reads_table(module: nn.Module) -> bool:
    return isinstance(_plain(module), nn.Embedding | nn.Linear)
