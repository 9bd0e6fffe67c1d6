"""Formulas of torch operators as machine code for this CPU, which torch's own compiler (AOTInductor) writes.

Compiling takes a C++ compiler and some 20 s, so it is left to a process of its own, which starts in the background once
a formula has been worked out for so long that it pays. What it writes is kept in the user's cache directory, where
processes that come later find it: they load it in milliseconds and import no compiler. Until then, and wherever
anything is amiss, callers go on with torch's operators; a formula gives the same bits, so nobody sees the change.
PHICORE_KERNELS=0 turns it off.
"""

import functools
import hashlib
import importlib
import logging
import os
import platform
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phicore import atomic
from phicore.transforms import transformed

logger = logging.getLogger(__name__)

# Modules come from where this process has them from, not from its working directory, which may be anybody's.
COMMAND = "import sys; sys.path[:] = sys.argv[3:]; from phicore.native import main; main(*sys.argv[1:3])"


class Child(subprocess.Popen[bytes]):
    def __del__(self) -> None:
        """Nothing, where Popen warns of a process that outlives this one: it may."""


class Formula:
    """A function of tensors that may be run as machine code.

    Args:
        name: where it is found, "module:attribute".
        function: of tensors on a CPU; it writes its results to some of them and returns nothing.
        examples: arguments to compile for, and to compare what was compiled with the function on; the same each time.
        dynamic: for each argument the sizes that may differ from the examples', {dimension: name}; sizes of one name
            are equal.
        pays: after how much work, in the caller's units, compiling has been worth its time.
        scalar: torch writes loops over single elements and leaves vectors to the C++ compiler, as where elements are
            looked up, for which torch knows no vectors.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., None],
        examples: Callable[[], tuple[Tensor, ...]],
        dynamic: tuple[dict[int, str], ...],
        pays: int,
        *,
        scalar: bool = False,
    ) -> None:
        self.name, self.function, self.examples, self.dynamic = name, function, examples, dynamic
        self.pays, self.scalar, self.work = pays, scalar, 0
        self._run: Callable[..., None] | None = None
        self._given_up = self._looked = False
        self._start_process()
        if hasattr(os, "register_at_fork"):  # not on Windows
            os.register_at_fork(after_in_child=self._start_process)

    def _start_process(self) -> None:
        """What one process has for itself: after a fork the lock may be a thread's that is not there, and the compiler
        is no child of the new process, which would take it for one that has ended."""
        self._child: Child | None = None
        self._lock = threading.Lock()

    def ready(self, work: int, *tensors: Tensor) -> Callable[..., None] | None:
        """The machine code, or None where the caller is to do this much work without; compiling starts when it pays.

        Never waits, but for another thread that loads it. None also where a tensor is not a plain one on the CPU, or
        somebody is to see every operator: transforms of torch.func, fake tensors, make_fx.
        """
        if os.environ.get("PHICORE_KERNELS") == "0" or self._given_up:
            return None
        if transformed() or torch._C._len_torch_dispatch_stack() or not all(map(_is_plain, tensors)):
            return None
        if self._run is None:
            self.work += work
            if not self._looked or self.work >= self.pays:
                with self._lock:
                    self._look()
        return self._run

    def compile(self) -> bool:
        """Compiles and loads it, or loads it, and waits for that. False where that fails; the log says why."""
        with self._lock:
            self.work, self._given_up = self.pays, False
            self._look()
            if self._child is not None:
                self._child.wait()
                self._look()
        return self._run is not None

    def _look(self) -> None:
        """Loads what lies in the cache, or compiles it if that pays by now."""
        self._looked = True
        if self._run is not None or self._given_up or (self._child is not None and self._child.poll() is None):
            return
        try:
            directory = cache()
            path = directory / self.file()
            if path.exists():
                self._run = self._load(path)
            elif self.work >= self.pays:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._build(path)
        except Exception as error:  # whatever it is, torch's operators give the same result
            self._give_up(str(error))

    def _load(self, path: Path) -> Callable[..., None]:
        # Not through torch._inductor, which takes a second and 150 MB to import.
        runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)

        def run(*tensors: Tensor) -> None:
            runner.run(list(tensors))

        exact, given = self.examples(), self.examples()
        self.function(*exact)
        run(*given)
        if not all(map(torch.equal, exact, given)):
            path.unlink(missing_ok=True)
            raise RuntimeError(f"{path} gave other bits than torch's operators")
        return run

    def _build(self, path: Path) -> None:
        """Starts the compiler, unless another process compiles the same; or finds that it has failed."""
        log = path.with_suffix(".log")
        if self._child is not None:
            raise RuntimeError(f"torch's compiler failed; {log} says how")
        import fcntl  # not on Windows

        lock = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            # The lock goes to the child with the descriptor, and ends with it however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():  # since
                return
            logger.info("compiling %s in the background; it is kept in %s", self.name, path.parent)
            one_thread = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            with open(log, "wb") as output:
                self._child = Child(
                    [sys.executable, "-W", "ignore", "-c", COMMAND, self.name, str(path), *map(str, sys.path)],
                    env={**os.environ, **one_thread},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=(lock,),
                )
        except BlockingIOError:
            return
        finally:
            os.close(lock)

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        logger.info("%s is worked out by torch's operators, without machine code of its own: %s", self.name, reason)

    def file(self) -> str:
        """The library's name in the cache."""
        return f"{self.name.rpartition('.')[2].replace(':', '-').lower()}-{self.key()}.so"

    def key(self) -> str:
        """What the machine code depends on: torch, the C library, this CPU, the formula and this file."""
        sources = [Path(__file__), Path(sys.modules[self.name.partition(":")[0]].__file__ or "")]
        built = [torch.__version__, str(torch.version.git_version), *platform.libc_ver(), cpu()]
        parts = [*built, *(source.read_text() for source in sources)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Compiles it, in this process, to a library at path."""
        from torch import _inductor, export

        function = self.function

        class Module(nn.Module):
            def forward(self, *tensors: Tensor) -> tuple[()]:
                function(*tensors)
                return ()

        sizes = {name: export.Dim(name, min=1) for sizes in self.dynamic for name in sizes.values()}
        shapes = tuple({dim: sizes[name] for dim, name in of_one.items()} for of_one in self.dynamic)
        examples = self.examples()
        assert len({t.data_ptr() for t in examples}) == len(examples), "export takes tensors that share memory for one"
        program = export.export(Module(), examples, dynamic_shapes=(shapes,))
        with tempfile.TemporaryDirectory() as directory:
            package = Path(directory, "package.pt2")
            configs = {
                "cpp.dynamic_threads": True,  # as many threads as torch has when it runs, not as it has here
                "aot_inductor.compile_wrapper_opt_level": "O0",  # of what calls the kernel: takes longest to compile
                "aot_inductor.precompile_headers": False,  # they would lie in torch's shared place (see main)
                "cpp.simdlen": 1 if self.scalar else None,  # bits of a vector; None for the CPU's
                "assert_indirect_indexing": False,  # formulas keep what they look up in bounds themselves
            }
            _inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=configs)
            with zipfile.ZipFile(package) as archive:
                (library,) = (name for name in archive.namelist() if name.endswith(".so"))
                atomic.write_bytes(path, archive.read(library))


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu


def cache() -> Path:
    """The directory that machine code is kept in, if there is any: of this user, and for nobody else to write to."""
    if os.name != "posix":
        raise OSError("machine code is made on Linux and macOS only")
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phicore"
    if directory.exists() and (directory.stat().st_uid != os.getuid() or directory.stat().st_mode & 0o022):
        raise PermissionError(f"{directory} belongs to, or can be written to by, another user")
    return directory


@functools.cache
def cpu() -> str:
    """What tells this CPU's instructions from another's."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().lower().splitlines() if info.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "features", "isa"))), "")
    return " ".join([platform.machine(), torch.backends.cpu.get_cpu_capability(), features])


def main(*arguments: str) -> None:
    """Compiles formulas to files: what the process in the background does.

    Args:
        arguments: "module:attribute" and a file, and so on.
    """
    os.setpgid(0, 0)  # Ctrl-C is not for it: what it writes serves the next run
    os.nice(19)  # within its session: to one of its own Linux would give an equal share (autogroup)
    # torch's default, /tmp/torchinductor_<user>, is where another user can put code first; and 150 MB would stay there.
    with tempfile.TemporaryDirectory() as directory:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = directory
        for name, path in zip(arguments[::2], arguments[1::2], strict=True):
            module, _, attribute = name.partition(":")
            formula: Any = getattr(importlib.import_module(module), attribute)
            formula.write(Path(path))
