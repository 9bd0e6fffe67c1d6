"""What commands print, on rank 0 alone."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from phicore.cli.output import writing
from phicore.training.distributed import rank


def say(text: str) -> None:
    """A line for the user, at once."""
    if rank() != 0:
        return
    with writing():
        print(text, flush=True)


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Says what is done, and how long it took."""
    start = time.perf_counter()
    say(f"{what} ...")
    yield
    say(f"{what}: {time.perf_counter() - start:.1f} s")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, lines: bool = False) -> None:
    """A table on standard output, as wide as the terminal (120 columns where there is none)."""
    if rank() != 0:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, show_lines=lines, title_justify="left")
    for column in columns:
        drawn.add_column(column, overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))  # Text: brackets in a generation are no markup
    console = Console(width=None if sys.stdout.isatty() else 120)
    with console.capture() as text:  # by itself it ends the process where nobody reads any more
        console.print(drawn)
    say(text.get().removesuffix("\n"))


def gigabytes(n: float) -> str:
    """Bytes for people."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
