"""One adapter for an embedding and the heads that read its table: they stay tied, trained and merged as one.

The embedding's table is W [num, dim], its pair A [rank, num] and B [dim, rank], and W' = W + scaling * (B A)^T. A tied
head computes x W'^T = x W^T + scaling * (x B) A: the embedding's own pair, transposed.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from phicore.adapters.embedding import LoRAEmbedding, LowRankEmbedding
from phicore.adapters.lora import LoRALinear, LowRankLayer
from phicore.modules import matches


class TiedHead(LoRALinear):
    """A head adapted by the pair of the embedding whose table it reads.

    Args:
        base: an nn.Linear with the embedding's table as its weight, or another adapter of one; it is frozen.
        embedding: the adapted embedding.
        dropout: probability of zeroing an input of the head's low-rank path while training.

    Attributes:
        embedding_A, embedding_B: the embedding's lora_A and lora_B, the very parameters.
    """

    def __init__(self, base: nn.Module, embedding: LoRAEmbedding, dropout: float = 0.0) -> None:
        self._pair = (embedding.lora_A, embedding.lora_B)  # for _make_pair, before nn.Module would register them
        options = {"rslora": embedding.rslora, "init": embedding.init}
        super().__init__(base, embedding.rank, embedding.alpha, dropout, **options)
        del self._pair
        self.adapter_name = embedding.adapter_name

    def _make_pair(self, base: nn.Module, where: dict[str, Any]) -> None:
        self.embedding_A, self.embedding_B = self._pair

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


def same_table(layer: Any, other: Any) -> bool:
    """Whether two adapted layers amount to one table, so that it can be merged once: the same pairs over one weight."""
    while isinstance(layer, LowRankLayer) and isinstance(other, LowRankLayer):
        pairs = [one.embedding_A if isinstance(one, TiedHead) else one.lora_A for one in (layer, other)]
        if pairs[0] is not pairs[1] or (layer.enabled, layer.strength) != (other.enabled, other.strength):
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


def add_tied(
    model: nn.Module, targets: Mapping[str, nn.Module], excluded: Collection[str], saved: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The targets with what is tied to them: all embeddings and linear layers that read one table.

    Args:
        model: the model, not changed yet.
        targets: the layers that target_modules means.
        excluded: names and suffixes of exclude_modules.
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
        if path in saved or matches(path, list(excluded)):
            raise ValueError(
                f"ensure_weight_tying: {path} is tied to a target, but is "
                f"{'trained whole (modules_to_save)' if path in saved else 'excluded'}"
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


def _plain(module: Any) -> Any:
    return module.innermost if isinstance(module, LowRankLayer) else module


def _reads_table(module: nn.Module) -> bool:
    return isinstance(_plain(module), nn.Embedding | nn.Linear)
