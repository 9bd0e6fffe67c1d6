"""Layers by their number in the model: layers_to_transform and layers_pattern, by PEFT's rule."""

import re
from collections.abc import Iterable, Sequence


def layer_index(name: str, patterns: Sequence[str] = ()) -> int | None:
    """The number of the block that a module stands in: the first in its name, since experts are numbered too.

    Args:
        name: "model.layers.7.mlp.up_proj", say.
        patterns: names (regular expressions) of the list of blocks; without any, each numbered list that itself stands
            in a module.

    Returns:
        7, or None for a module that stands in no such list.
    """
    for expression in [rf"(?:^|.*?\.)(?:{p})\.(?P<index>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<index>\d+)\."]:
        if found := re.match(expression, name):
            return int(found["index"])
    return None


def at_indices(
    names: Iterable[str], layers_to_transform: int | Sequence[int], layers_pattern: str | Sequence[str] | None
) -> set[str]:
    """Those of the names that stand in the blocks of these numbers.

    Raises:
        ValueError: a number at which none of the names stands; it is named beside those that there are.
    """
    wanted = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform)
    numbered = {name: layer_index(name, as_patterns(layers_pattern)) for name in names}
    there = sorted({index for index in numbered.values() if index is not None})
    if not there:
        lists = _numbered_lists(numbered)
        where = f"in layers_pattern={layers_pattern!r}" if layers_pattern else "in a numbered list inside a module"
        hint = f"; there are the lists {', '.join(lists)}: name one by layers_pattern" if lists else ""
        raise ValueError(f"layers_to_transform={layers_to_transform!r}: no layer that is meant stands {where}{hint}")
    missing = [index for index in wanted if index not in there]
    if missing:
        raise ValueError(
            f"layers_to_transform={layers_to_transform!r}: no layer that is meant has the index {missing[0]}; "
            f"there are {_ranges(there)}"
        )
    return {name for name, index in numbered.items() if index in wanted}


def as_patterns(layers_pattern: str | Sequence[str] | None) -> list[str]:
    """layers_pattern as a list; empty where it says nothing."""
    return [layers_pattern] if isinstance(layers_pattern, str) and layers_pattern else list(layers_pattern or ())


def described_by_indices(paths: Iterable[str], among: Iterable[str]) -> tuple[list[int], str | None] | None:
    """layers_to_transform and layers_pattern that mean just these paths among others, or None if no such pair does."""
    paths, among = set(paths), set(among)
    for pattern in (None, *map(re.escape, _numbered_lists(paths))):
        indices = {layer_index(path, as_patterns(pattern)) for path in paths}
        if None not in indices and {n for n in among if layer_index(n, as_patterns(pattern)) in indices} == paths:
            return sorted(index for index in indices if index is not None), pattern
    return None


def _numbered_lists(names: Iterable[str]) -> list[str]:
    """Names of the first numbered list that each of these modules stands in: "layers" of "model.layers.7.mlp"."""
    return sorted({found[1] for name in names if (found := re.match(r"(?:^|.*?\.)([^.]+)\.\d+\.", name))})


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0 to 2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
