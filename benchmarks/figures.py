"""Figures: what every suite reports, in one form, so that tables, pictures and the regression check need no other."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.pairs import Ratio

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One thing measured.

    Attributes:
        group: what is measured ("step time"); figures of one group stand together in a picture.
        name: of what ("dora, rank 16").
        unit: of ours and theirs.
        ours: phicore's value.
        peer: beside whom, None for a figure that stands alone.
        theirs: the peer's value.
        advantage: how many times better ours is than theirs; from pairs where there were pairs.
        noise: how far the same measure of two equals lies from 1; 0 for what is counted.
        better: which values are better.
    """

    group: str
    name: str
    unit: str
    ours: float
    peer: str | None = None
    theirs: float | None = None
    advantage: float | None = None
    noise: float = 0.0
    better: Literal["lower", "higher"] = "lower"


def timed(group: str, name: str, peer: str, pair: Ratio, *, unit: Literal["ms", "s"] = "ms") -> Figure:
    """A figure of alternating pairs."""
    factor = 1e3 if unit == "ms" else 1.0
    return Figure(
        group=group, name=name, unit=unit, ours=factor * pair.seconds, peer=peer, theirs=factor * pair.peer_seconds,
        advantage=1 / pair.ratio, noise=pair.noise,
    )  # fmt: skip


def counted(
    group: str,
    name: str,
    unit: str,
    ours: float,
    peer: str | None = None,
    theirs: float | None = None,
    *,
    better: Literal["lower", "higher"] = "lower",
    noise: float = 0.0,
) -> Figure:
    """A figure of two values; the advantage is their quotient, and None where one of them is zero."""
    advantage = None
    if ours and theirs:
        advantage = theirs / ours if better == "lower" else ours / theirs
    return Figure(
        group=group, name=name, unit=unit, ours=ours, peer=peer, theirs=theirs, advantage=advantage, noise=noise,
        better=better,
    )  # fmt: skip


def write(path: Path, settings: dict[str, Any], figures: Sequence[Figure]) -> None:
    """A suite's own JSON file."""
    path.write_text(json.dumps({"settings": settings, "figures": [asdict(f) for f in figures]}, indent=1) + "\n")


def read(figures: Sequence[dict[str, Any]]) -> list[Figure]:
    return [Figure(**figure) for figure in figures]


def dtype(name: str) -> tuple["torch.dtype", str]:
    """A dtype by name, and why; "auto" is what phicore itself would choose on this CPU."""
    import torch

    if name != "auto":
        return getattr(torch, name), "asked for"
    from phicore.training.precision import choose_dtype

    return choose_dtype(torch.device("cpu"))


def number(value: float | None) -> str:
    """Three digits that matter: 1234567 -> 1,230,000 is not what a count is, so integers stay whole."""
    if value is None:
        return "-"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
