"""Writing a checkpoint while training goes on."""

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs one function at a time in a thread.

    The thread is no daemon: a process that ends early, with an error say, ends the write that has begun first.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], object]) -> None:
        """Starts a function, after the one before has ended.

        Raises:
            Exception: what the one before raised.
        """
        self.wait()

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="phicore-checkpoint")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the function has raised something that nobody has been told of."""
        return self._error is not None

    def join(self) -> None:
        """Waits for the function's end, whatever it raises."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """Waits for the function's end.

        Raises:
            Exception: what it raised; once.
        """
        self.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error
