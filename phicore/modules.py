"""Naming modules: which ones a target means, what it may have meant instead, and how one is put in another's place."""

import difflib
import re
import sys
import warnings
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

ALL_LINEAR = "all-linear"
STRING_OR_NAMES = "a string or a list of names"

Model = TypeVar("Model", bound=nn.Module)  # what a function takes and gives back, of the caller's own class

# Models that fuse projections: what people write -> what is there, and the reverse.
FUSED = {
    "q_proj": '"qkv_proj"',
    "k_proj": '"qkv_proj"',
    "v_proj": '"qkv_proj"',
    "gate_proj": '"gate_up_proj"',
    "up_proj": '"gate_up_proj"',
    "qkv_proj": "q_proj, k_proj and v_proj",
    "gate_up_proj": "gate_proj and up_proj",
}


def matches(name: str, targets: str | Sequence[str]) -> bool:
    """Whether a module name is meant: by a list, as an exact name or a ".name" suffix; by a string, as a regular
    expression that matches it whole. (PEFT's rule.)"""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def around(name: str) -> Iterator[str]:
    """The names of the modules that a module stands in, outermost first, and its own."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def within(name: str, targets: Sequence[str]) -> bool:
    """Whether a list means a module or one that it stands in."""
    return any(matches(outer, targets) for outer in around(name))


def stands_in(name: str, places: Container[str]) -> bool:
    """Whether a module is one of those with these names, or stands in one."""
    return any(outer in places for outer in around(name))


PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PLAIN_BY_NAME = {"FalconLinear"}  # transformers' with a forward of their own that computes as nn.Linear's


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer is an nn.Linear or a convolution by its class but computes otherwise, as routers of mixtures and
    convolutions with standardised weights do."""
    kind = type(layer)
    methods = ("forward", "_conv_forward")  # the latter is what a convolution's forward calls
    own = any(
        isinstance(layer, plain)
        and any(getattr(kind, name, None) is not getattr(plain, name, None) for name in methods)
        for plain in PLAIN
    )
    return own and kind.__name__ not in PLAIN_BY_NAME


def coded_elsewhere(layer: nn.Module) -> str:
    """What a linear layer of another library is that holds its weight in codes (bitsandbytes'), and what to do about
    it, in words; empty for any other."""
    weight = layer._parameters.get("weight") if isinstance(layer, nn.Linear) else None
    if weight is None or weight.is_floating_point():
        return ""
    return (
        f"a {type(layer).__name__} with {weight.dtype} weights, coded by another library: load the full-precision "
        f"model and use phicore.quantize_, or read a directory in bitsandbytes' NF4 by "
        f"phicore.formats.huggingface.load_model, which makes its layers NF4Linear"
    )


def ends_with(expression: str) -> str:
    """The regular expression of names that end, after a dot or whole, in what another one matches."""
    return rf"(?:.*\.)?(?:{expression})"


def check_names(what: str, names: object, accepted: str = "a list of names") -> None:
    """Raises ValueError unless these are names. An empty one would be the model's own."""
    if isinstance(names, str | Mapping) or not (
        isinstance(names, Collection) and all(isinstance(name, str) and name for name in names)
    ):
        raise ValueError(f"{what} must be {accepted}, got {names!r}; none may be empty")


def check_expression(what: str, expression: str) -> None:
    """Raises ValueError unless expression is a regular expression."""
    if not isinstance(expression, str):
        raise ValueError(f"{what} must hold regular expressions, got {expression!r}")
    try:
        with warnings.catch_warnings():
            # Global flags behind a prefix are an error from Python 3.11 on; 3.10 warns and applies them to the prefix.
            warnings.simplefilter("error", DeprecationWarning)
            re.compile(expression)
    except (re.error, OverflowError, RecursionError, DeprecationWarning) as error:
        shown = expression if len(expression) <= 80 else expression[:77] + "..."
        raise ValueError(f"{what}: {shown!r} is no regular expression: {error}") from error


def leaves(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], closed: tuple[type[nn.Module], ...] = ()
) -> Iterator[tuple[str, nn.Module]]:
    """Every submodule of one of these kinds with its name, not descending into one, nor into one of a closed kind. A
    module that stands in two places comes twice. The inside of nn.MultiheadAttention is left out: it reads its
    projections' weights past their forward, so a layer put there would be ignored."""

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module._modules.items():  # named_children would pass over a second place in this module
            if isinstance(child, kinds):
                yield prefix + name, child
            elif child is not None and not isinstance(child, (nn.MultiheadAttention, *closed)):
                yield from walk(child, f"{prefix}{name}.")

    return walk(model, "")


def select(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: Sequence[str],
    kinds: tuple[type[nn.Module], ...],
    closed: tuple[type[nn.Module], ...] = (),
    all_linear: tuple[type[nn.Module], ...] | None = None,
    fused_targets: str | None = None,
    excludable: Iterable[str] = (),
) -> dict[str, nn.Module]:
    """The modules that target_modules means, by name, in the model's order.

    Args:
        model: the tree to search.
        target_modules: "all-linear" (every linear layer but those with a forward of their own and the output head:
            what the model's get_output_embeddings returns, and layers whose weight is tied to another module's); a
            regular expression that matches whole names; or a list of names or ".name" suffixes.
        exclude_modules: names or suffixes to leave out; a container's, with all that is in it.
        kinds: what can be replaced.
        closed: kinds of modules whose inside is left alone.
        all_linear: those of the kinds that "all-linear" means; None for all.
        fused_targets: what targets do that mean a projection (q_proj) which the model holds fused with others
            (qkv_proj): "raise", "map" to the whole fused module, with a warning that says so, or "split", for a caller
            that takes the parts of what is chosen from `parts_meant`. None raises too, for callers that do not offer
            the choice.
        excludable: names of modules beside the candidates that an exclusion may mean.

    Raises:
        ValueError: a model that is such a module itself; a target or an exclusion that matches nothing, naming it and
            what is near; a target that means a part of a fused projection, unless it is mapped; a target that is of
            another kind, or no regular expression.

    Warns:
        UserWarning: layers that "all-linear" leaves out; layers of another kind beside those that a target means.
    """
    if isinstance(model, (*kinds, nn.MultiheadAttention)):
        raise ValueError(
            f"the model itself is of type {type(model).__name__}, and nothing can take its place; put it into another "
            f"module, such as nn.Sequential"
        )
    caller = 6 if fused_targets else 4  # frames to the line that calls attach, or quantize_
    check_names("exclude_modules", exclude_modules)
    if not target_modules:
        raise ValueError(f'target_modules must name something, got {target_modules!r}; "{ALL_LINEAR}", say')
    if isinstance(target_modules, str):
        check_expression("target_modules", target_modules)
    else:
        check_names("target_modules", target_modules, STRING_OR_NAMES)
    every = dict(model.named_modules(remove_duplicate=False))
    candidates = dict(leaves(model, kinds, closed))
    meant = {} if target_modules == ALL_LINEAR else {n: m for n, m in every.items() if matches(n, target_modules)}
    for excluded in exclude_modules:
        check_exclusion(excluded, every, [*candidates, *excludable, *meant])
    if target_modules == ALL_LINEAR:
        chosen = _all_linear(model, candidates, every, all_linear or kinds, caller + 1)
    else:
        chosen = _targets(model, target_modules, candidates, every, kinds, fused_targets, caller + 1)
    left_out = {name for name in every if matches(name, exclude_modules)}
    chosen = {n: module for n, module in chosen.items() if not stands_in(n, left_out)}
    if not chosen:
        there = ", ".join([*candidates][:10]) or "none"
        raise ValueError(
            f"target_modules={target_modules!r} with exclude_modules={list(exclude_modules)!r} leaves no module of "
            f"{type(model).__name__}; of the layers that can be chosen here ({_kinds_named(kinds)}) it has {there}"
        )
    check_not_in_peft(chosen, every)
    whole = {n for n, m in candidates.items() if n in chosen or not isinstance(m, nn.MultiheadAttention)}
    shut = whole | left_out | {name for name, module in every.items() if isinstance(module, closed)}
    others = [n for n, m in meant.items() if m._parameters and not stands_in(n, shut)]
    if others:
        shown = listed([f"{name} ({type(every[name]).__name__})" for name in others], 5)
        warnings.warn(
            f"target_modules={target_modules!r} means layers that cannot be adapted or quantized, too, and they stay "
            f"as they are: {shown}",
            stacklevel=caller,
        )
    return chosen


def _all_linear(
    model: nn.Module,
    candidates: dict[str, nn.Module],
    every: dict[str, nn.Module],
    linear: tuple[type[nn.Module], ...],
    caller: int,
) -> dict[str, nn.Module]:
    """The candidates that "all-linear" means, see `select`; caller counts frames to the line that warnings are of."""
    heads = output_heads(model)
    chosen = {n: m for n, m in candidates.items() if m not in heads and isinstance(m, linear)}
    # An embedding is not linear: a head that is tied to one needs no word.
    blocks = {m for together in sharing(model) if all(isinstance(m, linear) for m in together) for m in together}
    if shared := [name for name, module in candidates.items() if module in blocks]:
        warnings.warn(
            f"all-linear leaves out layers that share a weight with each other: {', '.join(shared)}", stacklevel=caller
        )
    others = [name for name, module in chosen.items() if has_own_forward(module)]
    if others and len(others) == len(chosen) and (coded := coded_elsewhere(chosen[others[0]])):
        raise ValueError(f"all-linear finds no layer of {type(model).__name__} to replace: {others[0]} is {coded}")
    if others:
        kind_names = ", ".join(sorted({type(chosen[name]).__name__ for name in others}))
        warnings.warn(
            f"all-linear leaves out layers with a forward of their own ({kind_names}): {', '.join(others)}",
            stacklevel=caller,
        )
    if hidden := [name for name, module in every.items() if isinstance(module, nn.MultiheadAttention)]:
        warnings.warn(
            f"all-linear leaves out nn.MultiheadAttention, whose projections are not called as layers: "
            f"{', '.join(hidden)}",
            stacklevel=caller,
        )
    return {name: module for name, module in chosen.items() if name not in others}


def _targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    candidates: dict[str, nn.Module],
    every: dict[str, nn.Module],
    kinds: tuple[type[nn.Module], ...],
    fused_targets: str | None,
    caller: int,
) -> dict[str, nn.Module]:
    """The candidates that names or a regular expression mean, see `select`; caller as in _all_linear."""
    fused: dict[str, list[str]] = {}  # a target that means a part of a fused layer -> the whole layers
    entries: list[str | list[str]] = (
        [target_modules] if isinstance(target_modules, str) else [[target] for target in target_modules]
    )
    for entry in entries:
        shown = entry if isinstance(entry, str) else entry[0]
        # A model with layers.0.qkv_proj has no layers.0.q_proj, but a target that would match one means a part of it.
        if wholes := [n for n in candidates if not matches(n, entry) and parts_meant(n, entry, every)]:
            fused[shown] = wholes
        elif not any(matches(name, entry) for name in candidates):
            raise ValueError(_no_target(entry, shown, candidates, every, kinds))
    if fused:
        told = _fused_message(type(model).__name__, fused)
        if fused_targets == "map":
            warnings.warn(f"{told}, which are taken whole in their place", stacklevel=caller)
        elif fused_targets != "split":
            choice = ' or set fused_targets="map" (or "split", for an adapter a part)' if fused_targets else ""
            raise ValueError(f"{told}; name those{choice}")
    mapped = {whole for wholes in fused.values() for whole in wholes}
    return {n: module for n, module in candidates.items() if n in mapped or matches(n, target_modules)}


def _no_target(
    entry: str | list[str],
    shown: str,
    candidates: dict[str, nn.Module],
    every: dict[str, nn.Module],
    kinds: tuple[type[nn.Module], ...],
) -> str:
    """What to say of a target that means no candidate."""
    others = [name for name in every if matches(name, entry)]
    check_not_in_peft(others, every)
    if others:
        return (
            f'target "{shown}" matches {others[0]}, which is a {type(every[others[0]]).__name__} and cannot be adapted '
            f"or quantized; layers that can: {_kinds_named(kinds)}, outside nn.MultiheadAttention"
        )
    if entry == [ALL_LINEAR]:
        return f'"{ALL_LINEAR}" is taken by itself only, as a string; a list takes names and their ends'
    if isinstance(entry, str) and any(matches(name, [entry]) for name in candidates):
        return (
            f'target "{entry}", a string, is a regular expression for whole names, and matches none; for names '
            f'that end in it give a list: ["{entry}"]'
        )
    return no_match(f'target "{shown}"', shown, candidates)


def _kinds_named(kinds: tuple[type[nn.Module], ...]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))


def check_not_in_peft(names: Iterable[str], every: dict[str, nn.Module]) -> None:
    """Raises ValueError for a layer of peft's or a part of one: its pairs are linear layers too, and it writes to its
    base's weight."""
    tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is None or other is None:
        return
    for name in names:
        for outer in around(name):
            if isinstance(every[outer], (tuners.BaseTunerLayer, other.ModulesToSaveWrapper)):
                raise ValueError(
                    f"{name} belongs to an adapter of peft, which {outer} holds; merge that first "
                    f"(merge_and_unload of the PeftModel), or save it and give the plain model to phicore.load_adapter"
                )


def check_exclusion(excluded: str, every: dict[str, nn.Module], candidates: Iterable[str]) -> None:
    """Raises ValueError for an exclusion that cannot leave anything out."""
    found = [name for name in every if matches(name, [excluded])]
    if not found:
        raise ValueError(no_match(f'exclude_modules entry "{excluded}"', excluded, every))
    places = set(found)
    hidden = any(isinstance(part, nn.MultiheadAttention) for name in found for part in every[name].modules())
    if not hidden and not any(stands_in(name, places) for name in candidates):
        raise ValueError(
            f'exclude_modules entry "{excluded}" matches {found[0]}, a {type(every[found[0]]).__name__} which neither '
            f"is nor holds a layer that could be chosen: it would leave nothing out"
        )


def parts_of(name: str) -> dict[str, str]:
    """The parts of a fused layer of this name: their own names -> their names in the model's tree, were they there."""
    parent, dot, last = name.rpartition(".")
    return {part: f"{parent}{dot}{part}" for part, whole in FUSED.items() if whole == f'"{last}"'}


def parts_meant(name: str, target: str | Sequence[str], every: Container[str]) -> list[str]:
    """Those of a fused layer's parts that a target matches."""
    return [part for part, path in parts_of(name).items() if path not in every and matches(path, target)]


def _fused_message(model: str, fused: dict[str, list[str]]) -> str:
    targets = ", ".join(f'"{target}"' for target in fused)
    wholes = sorted({name.rsplit(".", 1)[-1] for names in fused.values() for name in names})
    return f"{model} fuses what target_modules names by {targets} into " + " and ".join(f'"{name}"' for name in wholes)


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def no_match(what: str, name: str, among: Sequence[str] | dict[str, nn.Module]) -> str:
    """The sentence for a name that matches no module: names the fused projection or the nearest names."""
    last_parts = sorted({path.rsplit(".", 1)[-1] for path in among if path})
    fused = FUSED.get(name.rsplit(".", 1)[-1], "")
    if fused and set(re.findall(r"\w+_proj", fused)) <= set(last_parts):
        verb = "splits" if " and " in fused else "fuses"
        return f"no module matches {what}; this model {verb} it: use {fused}"
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], last_parts, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are: {', '.join(last_parts[:20])}"
    return f"no module matches {what}; {hint}"


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model while torch's wrappers, which put a name before those of what they hold, are off it and its parts."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and unwrap(child) is not child
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = unwrap(child)
    try:
        yield unwrap(model)
    finally:
        for parent, name, child in wrapped:
            if parent._modules[name] is unwrap(child):  # and not an adapter, which took its place
                parent._modules[name] = child


def unwrap(module: nn.Module) -> nn.Module:
    """What DistributedDataParallel, DataParallel, AveragedModel, torch.compile and torch's checkpoint_wrapper hold; any
    other module itself."""
    inner = "module" if isinstance(module, DistributedDataParallel | nn.DataParallel | AveragedModel) else None
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        inner = name if name in module._modules else inner
    return module if inner is None else unwrap(module.get_submodule(inner))


def output_heads(model: nn.Module) -> set[nn.Module]:
    """What "all-linear" leaves alone: the output head that the model names, and any layer whose weight is also
    another module's (a tied head): adapting or quantising it would untie it."""
    heads = {module for together in sharing(model) for module in together}
    named = getattr(model, "get_output_embeddings", None)
    if callable(named) and (head := named()) is not None:
        heads.add(head)
    return heads


def sharing(model: nn.Module) -> list[list[nn.Module]]:
    """The modules that hold one parameter together, for each parameter that several hold."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    return [together for together in owners.values() if len(together) > 1]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place that a dotted name names."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
