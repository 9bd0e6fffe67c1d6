"""Putting adapters into a model, and finding them there."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from phicore.adapters.attention import (
    OpenAttention,
    check_kind,
    keep_off_fused_paths,
    layer_setting,
    projections,
)
from phicore.adapters.base import transposed_kinds
from phicore.adapters.config import LoRAConfig, pattern_value
from phicore.adapters.convolution import CONVOLUTIONS, DoRAConvolution, LoRAConvolution, LowRankConvolution
from phicore.adapters.dora import DoRALinear
from phicore.adapters.embedding import DoRAEmbedding, LoRAEmbedding, LowRankEmbedding
from phicore.adapters.experts import DoRAExperts, LoRAExperts
from phicore.adapters.fused import FusedDoRALinear, FusedLoRALinear, Split, part_paths, splits
from phicore.adapters.layer_index import at_indices
from phicore.adapters.lora import LoRALinear, LowRankLayer, LowRankLinear
from phicore.adapters.parameters import named_stacks, plan_parameters
from phicore.adapters.tied import (
    TiedDoRAEmbedding,
    add_tied,
    keep_ties,
    owners_of_tied,
    tied_embedding,
    tied_head,
)
from phicore.adapters.token_rows import token_rows
from phicore.adapters.trained import TrainedBias, TrainedPart, biases_beside, has_bias, new_bias, trains_bias
from phicore.modules import Model, check_not_in_peft, matches, no_match, replace, select, unwrapped
from phicore.nf4.convert import check_layer, coded
from phicore.nf4.linear import NF4Linear
from phicore.nf4.pages import Freed

finishers: list[Callable[[nn.Module], None]] = []
"""Called with each model that attach has changed, as those of quantize_."""


def linear_kinds() -> tuple[type[nn.Module], ...]:
    """What "all-linear" can mean."""
    return (nn.Linear, NF4Linear, LowRankLinear, *transposed_kinds())


def adaptable_kinds() -> tuple[type[nn.Module], ...]:
    """What a target can name."""
    return (
        *linear_kinds(), nn.Embedding, LowRankEmbedding, *CONVOLUTIONS, LowRankConvolution, nn.MultiheadAttention,
    )  # fmt: skip


def layer_class(base: nn.Module, dora: bool) -> type[LowRankLayer]:
    """The adapter layer for a base of one of the adaptable kinds."""
    if LowRankEmbedding.fits(base):
        return DoRAEmbedding if dora else LoRAEmbedding
    if LowRankConvolution.fits(base):
        return DoRAConvolution if dora else LoRAConvolution
    return DoRALinear if dora else LoRALinear


class TrainedCopy(TrainedPart):
    """A module of `modules_to_save`: a trained copy that stands in for its frozen base.

    Attributes:
        trained: the copy that trains and answers while `enabled`.
    """

    what = "trained whole"

    def __init__(self, base: nn.Module, adapter_name: str) -> None:
        trained = copy.deepcopy(base).requires_grad_(True)
        super().__init__(base.requires_grad_(False), adapter_name)
        self.trained = trained

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.trained if self.enabled else self.base)(*args, **kwargs)

    def merged(self, shared: dict[int, nn.Parameter]) -> nn.Module:
        answering = self.trained if self.enabled else self.base
        kept: dict[int, Any] = {id(buffer): buffer for buffer in answering.buffers()}
        for p in answering.parameters():
            kept[id(p)] = shared.setdefault(id(p), nn.Parameter(p.detach(), requires_grad=False))
        return copy.deepcopy(answering, kept)  # its tensors are shared with the copy that trains

    def __getattr__(self, name: str) -> Any:
        # Code that reads a head's or an embedding's weight finds that of the module that answers.
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            answering = "trained" if vars(self).get("enabled") else "base"  # it is missing while a copy is made
            return getattr(nn.Module.__getattr__(self, answering), name)


AdapterLayer = LowRankLayer | TrainedPart | LoRAExperts


def plan(model: nn.Module, config: LoRAConfig) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Which modules `attach` would adapt and which it would copy whole, by name; the model is not changed.

    Raises:
        ValueError: a target, an exclusion, a pattern or an entry of modules_to_save that matches nothing; an entry of
            modules_to_save that has an adapter in it.
    """
    saved: dict[str, nn.Module] = {}
    every = dict(model.named_modules(remove_duplicate=False))
    for entry in config.modules_to_save:
        found = {name: module for name, module in every.items() if matches(name, [entry])}
        if not found:
            raise ValueError(no_match(f'modules_to_save entry "{entry}"', entry, every))
        for name, module in found.items():
            if any(isinstance(inner, AdapterLayer) for inner in module.modules()):
                raise ValueError(f'modules_to_save entry "{entry}" matches {name}, which has an adapter in it already')
            _check_trains_whole(entry, name, module)
        saved |= found
    check_not_in_peft(saved, every)
    saved = _in_every_name(saved, every)
    whole = tuple(f"{path}." for path in saved)
    only_parameters = bool(config.target_parameters) and not config.target_modules
    chosen: dict[str, nn.Module] = {}
    if not only_parameters:
        chosen = _chosen(model, config, saved)
    chosen = {path: module for path, module in chosen.items() if path not in saved and not path.startswith(whole)}
    targets = _with_projections(chosen)
    if both := sorted(targets.keys() & saved.keys()):
        raise ValueError(
            f"target_modules means {both[0]}, as a projection of an attention, and so does modules_to_save"
        )
    if not targets and not only_parameters:
        raise ValueError(
            f"modules_to_save={list(config.modules_to_save)!r} holds every module that "
            f"target_modules={config.target_modules!r} means, which leaves none to adapt"
        )
    parts = splits(model, config, targets)
    names = (
        chosen
        | targets
        | {part_paths(path)[part]: targets[path] for path, split in parts.items() for part in split.ranks}
    )
    for path, (module, ranks, _) in plan_parameters(model, config, targets, saved).items():
        names |= {f"{path}.{parameter}": module for parameter in ranks}
    for what, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key in pattern:
            if not any(pattern_value({key: True}, name, False) for name in names):
                raise ValueError(no_match(f'{what} key "{key}"', key, names))
    all_meta = all(parameter.is_meta for parameter in model.parameters())
    for name, module in (targets | saved).items():
        offloaded = not all_meta or "forward" in vars(module)  # by accelerate, which may offload a model whole
        if offloaded and any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError(f"{name} has its weights on meta: it is offloaded; load the model whole")
    for name, module in targets.items():
        weight: Any = None if isinstance(module, NF4Linear | LowRankLayer) else module.weight
        if weight is not None and not weight.is_floating_point():
            raise TypeError(f"{name} has {weight.dtype} weights; adapters need a floating-point or NF4 layer")
        if weight is not None and config.adapter_dtype is None and weight.dtype.itemsize < 2:
            raise TypeError(f"{name} has {weight.dtype} weights, in which no adapter trains; set adapter_dtype")
        if config.init == "loftq":
            if not isinstance(module, nn.Linear):
                raise ValueError(
                    f'init "loftq" codes dense nn.Linear layers to NF4 itself, and {name} is a '
                    f"{type(module).__name__}; attach before quantizing, and to nn.Linear layers only"
                )
            check_layer(name, module, all_meta)
        if config.init in ("pissa", "olora") and not isinstance(module, linear_kinds()):
            raise ValueError(f'init "{config.init}" is for linear layers, and {name} is a {type(module).__name__}')
        if config.init not in ("kaiming", "gaussian") and name in parts:
            raise ValueError(
                f'init "{config.init}" decomposes a whole weight and cannot start the parts of {name}; use "kaiming" '
                f'or "gaussian", or fused_targets="map"'
            )
        try:
            layer_class(module, config.dora).pair_shapes(module, pattern_value(config.rank_pattern, name, config.rank))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return targets, saved


def _check_trains_whole(entry: str, path: str, module: nn.Module) -> None:
    """Raises ValueError for a module of modules_to_save of which some weight, or everything, cannot train."""
    for inner, part in module.named_modules(prefix=path):
        integers = [name for name, p in part.named_parameters(recurse=False) if not p.is_floating_point()]
        if integers or isinstance(part, NF4Linear):
            raise ValueError(
                f'modules_to_save entry "{entry}" matches {path}, and {inner} is a {type(part).__name__} whose weight '
                f"is coded and cannot train; leave it out where the model is quantized (exclude_modules of quantize_)"
            )
    if not any(True for _ in module.parameters()):
        raise ValueError(
            f'modules_to_save entry "{entry}" matches {path}, a {type(module).__name__} without parameters'
        )


def _in_every_name(named: dict[str, nn.Module], every: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules by name, and by the other names of their places, which they have where a module around them stands in
    several."""

    def place(name: str) -> tuple[nn.Module, str]:
        parent, _, last = name.rpartition(".")
        return every[parent], last

    places = {place(name) for name in named if name}
    return {name: module for name, module in every.items() if name in named or (name and place(name) in places)}


def _chosen(model: nn.Module, config: LoRAConfig, saved: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that target_modules means, in the blocks that are to be adapted, with what is tied to them."""
    chosen = select(
        model,
        config.target_modules,
        config.exclude_modules,
        adaptable_kinds(),
        closed=(TrainedPart, LoRAExperts),
        all_linear=linear_kinds(),
        fused_targets=config.fused_targets,
        excludable=[path for path, _, _ in named_stacks(model, (LowRankLayer, TrainedPart))]
        if config.target_parameters
        else (),
    )
    if config.layers_to_transform is not None:
        there = at_indices(chosen, config.layers_to_transform, config.layers_pattern)
        chosen = {path: module for path, module in chosen.items() if path in there}
    return add_tied(model, chosen, config.exclude_modules, saved) if config.ensure_weight_tying else chosen


def _with_projections(targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The targets with the projections of each nn.MultiheadAttention in its place."""
    found: dict[str, nn.Module] = {}
    made: dict[nn.Module, dict[str, nn.Module]] = {}
    for path, module in targets.items():
        if isinstance(module, nn.MultiheadAttention):
            check_kind(module, path)
            layers = made.setdefault(module, projections(module))
            found |= {f"{path}.{name}": layer for name, layer in layers.items()}
        else:
            found[path] = module
    return found


def _opened(model: nn.Module, targets: dict[str, nn.Module]) -> tuple[dict[str, nn.Module], dict[str, OpenAttention]]:
    """The targets with projections of nn.MultiheadAttention as layers of an OpenAttention each, and these by the name
    of the place that they are to take; the model is not changed."""
    found, opened = dict(targets), {}
    made: dict[nn.Module, OpenAttention] = {}
    for path in targets:
        parent, _, last = path.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(owner, nn.MultiheadAttention) and not isinstance(owner, OpenAttention):
            if owner not in made:
                made[owner] = OpenAttention(owner)
            opened[parent] = made[owner]
            found[path] = getattr(made[owner], last)
    return found, opened


def attach(model: Model, config: LoRAConfig, name: str = "default") -> Model:
    """Freezes a model and puts adapter layers in it, in place.

    Over a model that has adapters already, the new one adapts their sum, and it alone trains. With init "loftq" the
    base of each adapted layer becomes its NF4 code. Names are those without torch.compile's; a layer that is compiled
    alone is so no more once it is adapted.

    Args:
        model: any module; its linear layers (nn.Linear, NF4Linear, transformers' Conv1D) can be adapted, and its
            nn.Embedding, nn.Conv1d, 2d and 3d and nn.MultiheadAttention where target_modules names them, and the
            parameters that target_parameters names.
        config: which layers and how.
        name: of the adapter, for saving and switching.

    Returns:
        The model. Its parameters that require gradients are now the adapter's.

    Raises:
        ValueError: a target that matches nothing (with near misses), an adapter of this name that is there already, a
            merged model, one that torch has wrapped for several ranks. The model is then unchanged.
        TypeError: a target whose weights are not floating-point, a config that is no LoRAConfig; the model is then
            unchanged.
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"attach takes a LoRAConfig, got a {type(config).__name__}")
    if name in {layer.adapter_name for _, layer in adapter_layers(model)}:
        raise ValueError(f'the model has an adapter named "{name}" already; give another name')
    if any(merged_layers(model)):
        raise ValueError("the model's adapters are merged; unmerge it before attaching another")
    check_not_wrapped(model)
    with unwrapped(model) as bare:
        _attach(bare, config, name)
    return model


def _attach(model: nn.Module, config: LoRAConfig, name: str) -> None:
    targets, saved = plan(model, config)
    parts = splits(model, config, targets)
    stacks = plan_parameters(model, config, targets, saved)
    beside = parts_beside(model, config, name, targets, saved, stacks)
    targets, opened = _opened(model, targets)
    layers: dict[nn.Module, nn.Module] = {}
    tied = owners_of_tied(model, targets) if config.ensure_weight_tying else {}
    freed = Freed()  # DoRA's norms and some starts are computed of dense weights
    for path, module in sorted(targets.items(), key=lambda item: item[0] in tied):  # which take the pairs of others
        if module in layers:  # a layer that stands in two places gets one adapter
            continue
        if path in tied:
            layers[module] = _tied_layer(module, cast(LowRankEmbedding, layers[targets[tied[path]]]), config)
            continue
        dense, base = module, module
        if config.init == "loftq":
            base = coded(cast(nn.Linear, dense))
        rank, alpha = (
            layer_setting(model, pattern, path, default)
            for pattern, default in ((config.rank_pattern, config.rank), (config.alpha_pattern, config.alpha))
        )
        kind = TiedDoRAEmbedding if config.dora and path in tied.values() else layer_class(base, config.dora)
        layer = _adapter(kind, base, rank, alpha, config, parts.get(path))
        if config.init == "loftq":
            exact = cast(LowRankLinear, layer).dense_base()
            cast(LowRankLinear, layer).correct(cast(nn.Linear, dense).weight.detach().to(exact.dtype) - exact)
        layer.adapter_name = name
        if trains_bias(model, config.bias, path, module):
            layer.trained_bias = new_bias(layer, config.adapter_dtype)
        layers[module] = layer
        freed.add(4 * layer.innermost.weight.numel())
    experts: dict[nn.Module, LoRAExperts] = {}
    for module, ranks, alphas in stacks.values():
        if module not in experts:
            experts[module] = (DoRAExperts if config.dora else LoRAExperts)(
                module, ranks, alphas, rslora=config.rslora, init=config.init, dtype=config.adapter_dtype
            )
            experts[module].adapter_name = name
    copies = {module: TrainedCopy(module, name) for module in saved.values()}
    model.requires_grad_(False)
    for path, attention in opened.items():
        replace(model, path, attention)
    for path, module in targets.items():
        replace(model, path, layers[module].requires_grad_(True))
        layers[module].base.requires_grad_(False)
    for path, (module, _, _) in stacks.items():
        replace(model, path, experts[module])
        experts[module].pairs.requires_grad_(True)
    for path, module in saved.items():
        replace(model, path, copies[module])
        copies[module].trained.requires_grad_(True)
    for path, part in beside.items():
        replace(model, path, part)
        for parameter in part.parameters(recurse=False):
            parameter.requires_grad_(True)
    keep_off_fused_paths(model)
    keep_ties(model)
    for finish in finishers:
        finish(model)


SHARDED = {"FullyShardedDataParallel", "FSDPModule"}  # the latter is fully_shard's
WRAPPERS = {"DistributedDataParallel", *SHARDED}


def check_not_wrapped(model: nn.Module) -> None:
    """Raises ValueError for a model whose gradients torch sums over ranks."""
    _refuse(
        model,
        WRAPPERS,
        "which sums the gradients of those parameters over ranks that it was made with, and not of an adapter; attach "
        "first, and wrap the model then",
    )


def check_not_sharded(model: nn.Module) -> None:
    """Raises ValueError for a model of whose weights each rank has a part, where whole ones are needed."""
    _refuse(
        model,
        SHARDED,
        "whose weights are in parts on ranks; load and merge adapters in a model that is not sharded (save_adapter, "
        "called on all ranks, writes whole tensors of what fully_shard has sharded)",
    )


def check_not_flattened(model: nn.Module) -> None:
    """Raises ValueError for a model whose parts on ranks have no shape, so that nothing tells them from the whole."""
    _refuse(
        model,
        {"FullyShardedDataParallel"},
        "which holds parts of flattened weights; shard by fully_shard, or load its full state (get_model_state_dict of "
        "torch.distributed.checkpoint.state_dict) into a model that is not sharded, and save that",
    )


def _refuse(model: nn.Module, kinds: set[str], reason: str) -> None:
    for path, module in model.named_modules():
        own = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")}
        if found := own & kinds:
            raise ValueError(f"{path or 'the model'} is a {min(found)}, {reason}")


def _adapter(
    kind: type[LowRankLayer], base: nn.Module, rank: Any, alpha: Any, config: LoRAConfig, split: Split | None
) -> LowRankLayer:
    options: dict[str, Any] = {"rslora": config.rslora, "init": config.init, "dtype": config.adapter_dtype}
    if split is not None:
        fused = FusedDoRALinear if config.dora else FusedLoRALinear
        return fused(base, split.sizes, split.ranks, split.alphas, config.dropout, **options)
    return kind(base, rank, alpha, config.dropout, **options)


def _tied_layer(module: nn.Module, owner: LowRankEmbedding, config: LoRAConfig) -> LowRankLayer:
    """The adapter of a layer that reads an adapted embedding's table, with the embedding's own pair."""
    is_embedding = LowRankEmbedding.fits(module)
    layer = tied_embedding(module, owner) if is_embedding else tied_head(module, owner, config.dropout)
    if config.bias != "none" and has_bias(module):
        layer.trained_bias = new_bias(layer, config.adapter_dtype)
    return layer


def parts_beside(
    model: nn.Module,
    config: LoRAConfig,
    name: str,
    targets: dict[str, nn.Module],
    saved: dict[str, nn.Module],
    stacks: Collection[str],
) -> dict[str, TrainedPart]:
    """What `attach` would put beside the low-rank layers and the trained copies, by name; the model is not changed.

    Args:
        model, config, name: as `attach`.
        targets, saved: of `plan`.
        stacks: names of the modules of which parameters are adapted (target_parameters).

    Raises:
        ValueError: biases or tokens that cannot be trained.
    """
    if config.bias == "all" and any(adapter_layers(model)):
        raise ValueError(
            'bias="all" trains the biases of the whole model, which has an adapter already; use bias="lora_only"'
        )
    parts: dict[str, TrainedPart] = {}
    made: dict[nn.Module, TrainedPart] = {}
    for path, module in biases_beside(model, config.bias, targets, saved, stacks).items():
        if module not in made:  # a module that stands in two places has one trained bias
            made[module] = TrainedBias(module, name, config.adapter_dtype)
        parts[path] = made[module]
    taken = {*targets, *saved, *parts, *stacks}
    return parts | token_rows(model, config.trainable_token_indices, name, config.adapter_dtype, taken)


def adapter_layers(
    model: nn.Module, name: str | None = None, *, every_place: bool = False
) -> Iterator[tuple[str, AdapterLayer]]:
    """The adapter layers of a model with the names of the places they stand in, outermost first.

    Args:
        model: any module.
        name: only this adapter's.
        every_place: a layer that stands in two places comes twice.

    Yields:
        (name that the layer had before adapting, layer).
    """
    every = dict(model.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=not every_place):
        if not isinstance(module, AdapterLayer) or (name is not None and module.adapter_name != name):
            continue
        parent, _, last = path.rpartition(".")
        while last == "base" and isinstance(every[parent], AdapterLayer):  # an adapter under another
            path = parent
            parent, _, last = path.rpartition(".")
        yield path, module


def merged_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterLayer | OpenAttention]]:
    """The layers that `merge` made: name, merged layer, and the adapter layer that it stands for."""
    for path, module in model.named_modules(remove_duplicate=False):
        layer = module.__dict__.get("merged_from")
        if layer is not None:
            yield path, module, layer


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Within it, the base model alone answers: adapters are passed by.

    Raises:
        ValueError: the model has no adapter, or is merged.
    """
    layers = [layer for _, layer in adapter_layers(model)]
    merged = any(merged_layers(model))
    if not layers or merged:
        raise ValueError("the model has no adapter that could be disabled" + (" (it is merged)" if merged else ""))
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
