"""Machine code of formulas: when it is compiled, where it is kept, and what happens where that fails. That it gives the
right bits is for the tests of each formula."""

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from phicore import native

# Counts how often it was compiled, in a file; `sleep` makes compiling take longer than what the test does meanwhile.
MODULE = """
import os, time
import torch
from phicore.native import Formula

def double(x, out):
    out.copy_(x * 2)

class Counted(Formula):
    def write(self, path):
        with open(os.environ["COUNT"], "a") as file:
            file.write("x")
        time.sleep(float(os.environ.get("SLEEP", "0")))
        super().write(path)

DOUBLE = Counted("doubling:DOUBLE", double, lambda: (torch.arange(8.0), torch.empty(8)), ({0: "n"}, {0: "n"}), 100)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the module `doubling`, and where machine code is kept."""
    (tmp_path / "doubling.py").write_text(MODULE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "doubling", raising=False)
    return tmp_path


def script(code: str) -> subprocess.Popen[str]:
    code = "from doubling import DOUBLE\nimport json, sys, time\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> object:
    out, error = process.communicate(timeout=700)
    assert process.returncode == 0, error
    return json.loads(out)


def formula(pays: int = 100) -> native.Formula:
    """One that nothing was looked for of yet."""
    import doubling

    made = doubling.DOUBLE
    return native.Formula(made.name, made.function, made.examples, made.dynamic, pays)


def test_compiled_in_the_background_once_it_pays_and_found_by_the_next_process(place: Path):
    # Two at once, as ranks would, each with work that pays at its third call. None waits. The compiler has what the
    # other processes of the machine leave it: on busy cores that took over three minutes.
    until_there = """
        tried = []
        while (run := DOUBLE.ready(40)) is None:
            tried.append(DOUBLE._child is not None)
            time.sleep(0.05)
            if len(tried) > 12000:
                sys.exit("it never came")
        assert DOUBLE._child is None or DOUBLE._child.returncode == 0, "a zombie"
        print(json.dumps([len(tried), tried[:3], "torch._inductor" in sys.modules]))
    """
    both = [answer(process) for process in [script(until_there) for _ in range(2)]]
    assert all(calls > 3 and not imported for calls, _, imported in both), both
    assert all(tried[:2] == [False, False] for _, tried, _ in both), both
    assert (place / "count").read_text() == "x"
    assert sorted(any(tried) for _, tried, _ in both)[-1], both
    later = """
        import torch
        out = torch.empty(3)
        DOUBLE.ready(1)(torch.tensor([1.0, 2.0, 1e-40]), out)
        print(json.dumps([out.tolist(), "torch._inductor" in sys.modules]))
    """
    doubled, imported = answer(script(later))
    assert doubled == torch.tensor([2.0, 4.0, 2 * torch.tensor(1e-40)]).tolist()
    assert not imported
    assert (place / "count").read_text() == "x"
    assert (place / "phicore").stat().st_mode & 0o777 == 0o700


def test_a_process_may_end_before_the_one_that_compiles(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLEEP", "100")
    monkeypatch.setenv("PYTHONWARNINGS", "error::ResourceWarning")
    out, error = script("DOUBLE.ready(1000)\nprint(DOUBLE._child.pid)").communicate(timeout=100)
    os.kill(int(out), signal.SIGKILL)
    assert not error


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_waits_for_no_thread_that_is_not_there_and_takes_no_compiler_for_its_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SLEEP", "100")
    forked = """
    import os
    DOUBLE.ready(1000)
    compiler = DOUBLE._child.pid
    DOUBLE._lock.acquire()  # as a thread does that loads what was compiled
    if not (child := os.fork()):
        os._exit(10 + (DOUBLE.ready(1000) is not None) + 2 * DOUBLE._given_up)
    for _ in range(600):
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
    print(json.dumps([compiler, DOUBLE._child.poll(), ended[1]]))
    """
    compiler, running, ended = answer(script(forked))
    os.kill(compiler, signal.SIGKILL)
    assert running is None
    assert os.waitstatus_to_exitcode(ended) == 10


def test_a_compiler_that_fails_is_told_of_once(place: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    import doubling

    monkeypatch.setenv("CXX", "/no/such/compiler")
    with caplog.at_level(logging.INFO, logger="phicore.native"):
        assert not doubling.DOUBLE.compile()
        assert doubling.DOUBLE.ready(1000) is None
    (_, failed) = [record.getMessage() for record in caplog.records]
    assert "doubling:DOUBLE is worked out by torch's operators" in failed
    assert "torch's compiler failed" in failed
    (log,) = (place / "phicore").glob("*.log")
    assert str(log) in failed
    assert "/no/such/compiler" in log.read_text()
    assert not list((place / "phicore").glob("*.so"))


def kill_the_first_compiler(place: Path) -> None:
    import doubling

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLEEP", "100")
        assert doubling.DOUBLE.ready(1000) is None
        child = doubling.DOUBLE._child
        while not (place / "count").exists():
            assert child.poll() is None
            time.sleep(0.05)
        assert os.getpriority(os.PRIO_PROCESS, child.pid) == 19
        assert os.getsid(child.pid) == os.getsid(0)  # in a session of its own a niceness counts for nothing
        assert os.getpgid(child.pid) != os.getpgid(0)  # Ctrl-C is not for it
        child.kill()
        child.wait()
        assert doubling.DOUBLE.ready(1000) is None
        assert doubling.DOUBLE._given_up


def test_compiling_after_a_kill_trusts_and_leaves_nothing_in_places_that_are_shared(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    kill_the_first_compiler(place)
    for name in ("there", "tmp"):
        (place / name).mkdir()
    (place / "there" / "zipfile.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(place / "there")
    monkeypatch.setenv("TMPDIR", str(place / "tmp"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("PYTHONWARNINGS", "error")  # nor does it fail of what torch warns of
    assert formula().compile(), [log.read_text() for log in place.rglob("*.log")]  # the lock went with the killed one
    assert (place / "count").read_text() == "xx"
    assert not list((place / "tmp").iterdir())

    (library,) = (place / "phicore").glob("*.so")
    other = formula()
    other.function = lambda x, out: out.copy_(x * 3)
    with caplog.at_level(logging.INFO, logger="phicore.native"):
        assert other.ready(1) is None
    assert "gave other bits" in caplog.text
    assert not library.exists()


def test_what_is_no_library_is_told_of(place: Path, caplog):
    made = formula()
    (place / "phicore").mkdir(mode=0o700)
    (place / "phicore" / made.file()).write_bytes(b"\x7fELF and no more")
    with caplog.at_level(logging.INFO, logger="phicore.native"):
        assert made.ready(1) is None
    assert "worked out by torch's operators" in caplog.text


def test_a_directory_that_others_write_to_is_not_trusted(place: Path, caplog):
    (place / "phicore").mkdir()
    (place / "phicore").chmod(0o777)
    with caplog.at_level(logging.INFO, logger="phicore.native"):
        assert formula().ready(1) is None
        assert not formula().compile()
    assert "can be written to by, another user" in caplog.text
    assert not list((place / "phicore").iterdir())


def test_kernels_can_be_turned_off(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PHICORE_KERNELS", "0")
    made = formula()
    for _ in range(3):
        assert made.ready(1000) is None
    assert not (place / "phicore").exists()


def test_nothing_is_written_before_it_pays(place: Path):
    made = formula()
    for _ in range(3):
        assert made.ready(30) is None
    assert not (place / "phicore").exists()


def test_the_key_tells_torch_libc_cpu_and_source_apart(place: Path, monkeypatch: pytest.MonkeyPatch):
    import doubling

    keys = {doubling.DOUBLE.key()}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9")
        keys.add(doubling.DOUBLE.key())
    with monkeypatch.context() as patch:
        patch.setattr(native, "cpu", lambda: "another")
        keys.add(doubling.DOUBLE.key())
    with monkeypatch.context() as patch:
        patch.setattr(platform, "libc_ver", lambda: ("glibc", "9.9"))
        keys.add(doubling.DOUBLE.key())
    (place / "doubling.py").write_text(MODULE + "\n")
    keys.add(doubling.DOUBLE.key())
    assert len(keys) == 5
    if sys.platform == "linux":
        assert len(native.cpu().split()) > 10  # what the CPU can do, one by one
