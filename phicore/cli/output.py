"""Standard output that cannot be written to: nobody reads it any more, or it is a file on a full disk."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NAME = "standard output"  # the file name of its errors


@contextmanager
def writing() -> Iterator[None]:
    """Around what is written there and flushed. An error comes once: what waits in the buffer, which would fail again
    as the interpreter ends, goes nowhere."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = NAME
        raise
