"""The command, the document, and the regression check, on made up results; the committed document is its file's."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import compare, figures, machine, report, suites
from benchmarks.figures import Figure, counted
from benchmarks.suites import Suite

ROOT = Path(__file__).parents[2]


def result(found: list[Figure], *, quick: bool = True) -> dict[str, Any]:
    dicts = [json.loads(json.dumps(vars(figure))) for figure in found]
    return {
        "quick": quick, "date": "2026-01-02", "commit": "abc", "threads": 2, "machine": machine.machine(),
        "versions": {"torch": "2.13", "deepspeed": None},
        "suites": {"layers": {"seconds": 90.0, "settings": {"dtype": "float32"}, "figures": dicts}},
    }  # fmt: skip


def figure(advantage: float, noise: float = 0.05, name: str = "dora") -> Figure:
    return Figure(
        group="step time", name=name, unit="ms", ours=2.0, peer="peft", theirs=2 * advantage, advantage=advantage,
        noise=noise,
    )  # fmt: skip


# ===== the committed document =====


def test_the_document_is_what_its_file_gives() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    source = re.search(r"^Made from `(benchmarks/results/\w+\.json)`", text, re.MULTILINE)
    assert source is not None
    committed = json.loads((ROOT / source[1]).read_text())
    assert report.markdown(committed, source[1]) == text
    assert ("quick form" in text) == committed["quick"]
    for picture in re.findall(r"\]\((benchmarks/\w+\.png)\)", text):
        assert (ROOT / "docs" / picture).stat().st_size > 1000, picture
    for suite in suites.SUITES:
        assert suite in committed["suites"] or f"{suite}" in text.partition("does not have:")[2].partition("\n")[0]


def test_the_result_file_names_no_host_and_no_path() -> None:
    for file in (ROOT / "benchmarks/results").glob("*.json"):
        assert not re.search(r'"[^"]*(/home|/tmp|/root|/work)\b', file.read_text()), file.name


# ===== the document =====


def test_failures_absences_and_noise_are_said(tmp_path: Path) -> None:
    made = result([figure(1.5), counted("graphs", "lora", "", 1, "peft", 7), counted("spills", "k", "", 3)])
    made["suites"]["nf4"] = {"seconds": 1.0, "failed": "exit status 1: No module named 'torchao'"}
    file = tmp_path / "some.json"
    file.write_text(json.dumps(made))
    report.main([str(file), "--docs", str(tmp_path)])
    text = (tmp_path / "benchmarks.md").read_text()
    assert "quick form" in text
    assert "not compared with: deepspeed" in text
    assert "does not have: finetune, zero, kernels, startup." in text
    assert "This suite failed: exit status 1: No module named 'torchao'" in text
    assert "| step time | dora | 2 ms | peft | 3 ms | 1.50 | 5.0% |" in text
    assert "| graphs | lora | 1 | peft | 7 | 7.00 |  |" in text
    assert "| spills | k | 3 |  |  |  |  |" in text
    assert (tmp_path / "benchmarks/layers.png").stat().st_size > 1000
    assert not (tmp_path / "benchmarks/nf4.png").exists()


# ===== the regression check =====


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        (figure(1.5), figure(1.5), False),
        (figure(1.5), figure(1.36), False),  # within the noise of both
        (figure(1.5), figure(1.30), True),
        (figure(1.5, noise=0.2), figure(1.30), False),
        (figure(1.0), figure(3.0), False),  # better
        (counted("graphs", "x", "", 1, "peft", 2), counted("graphs", "x", "", 2, "peft", 2), True),  # no noise at all
        (counted("lines", "x", "", 100), counted("lines", "x", "", 101), True),
        (counted("speed", "x", "", 100, better="higher"), counted("speed", "x", "", 101, better="higher"), False),
        (counted("speed", "x", "", 100, better="higher"), counted("speed", "x", "", 99, better="higher"), True),
    ],
)
def test_what_is_worse_beyond_the_noise_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: Figure, new: Figure, worse: bool
) -> None:
    for name, found in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(result([found])))
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == int(worse)
    assert (f"layers: {new.group}, {new.name}" in capsys.readouterr().out) == worse


def test_what_is_gone_or_failed_is_listed() -> None:
    old = result([figure(1.5), figure(1.2, name="lora")])
    assert compare.regressions(old, result([figure(1.5)])) == ["layers: step time, lora beside peft: no longer there"]
    failed = result([])
    failed["suites"]["layers"] = {"seconds": 1.0, "failed": "why"}
    assert compare.regressions(old, failed) == ["suite layers failed: why"]
    assert compare.regressions(old, {**failed, "suites": {}}) == ["suite layers is not in the new file"]


def test_forms_do_not_compare(tmp_path: Path) -> None:
    (tmp_path / "old").write_text(json.dumps(result([])))
    (tmp_path / "new").write_text(json.dumps(result([], quick=False)))
    assert compare.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 2


# ===== the command =====


def test_a_suite_that_fails_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Made(Suite):
        """Runs Python code, with the output's name as its argument."""

        def command(self, output: str, *, quick: bool, threads: int) -> list[str]:
            return [sys.executable, "-c", self.module, output]

    good = (
        "import sys, pathlib; from benchmarks import figures; "
        "figures.write(pathlib.Path(sys.argv[1]), {}, [figures.counted('g', 'n', 'MB', 1, 'peer', 2)])"
    )
    made = {
        "good": Made(good, "Good"),
        "absent": Made("raise ModuleNotFoundError('no peer in /some/where/site-packages/peer.py')", "Absent"),
        "silent": Made("pass", "Silent"),
    }
    for place in (command, report):
        monkeypatch.setattr(place, "SUITES", made)
    output = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    assert command.main(["--quick", "--output", str(output), "--docs", str(tmp_path)]) == 1
    written = json.loads(output.read_text())["suites"]
    assert written["good"]["figures"][0]["advantage"] == 2
    assert written["absent"]["failed"] == "exit status 1: ModuleNotFoundError: no peer in peer.py"
    assert "JSON is not as expected" in written["silent"]["failed"]
    said = capsys.readouterr()
    assert "suite absent FAILED" in said.err
    assert "suite silent FAILED" in said.err
    assert "good" in said.out
    assert command.main(["--suite", "good", "--output", str(output), "--docs", str(tmp_path)]) == 0


def test_figures_of_suites_with_a_form_of_their_own() -> None:
    row = {"state": 1.0, "sent": 1.0, "ms": 10.0, "time": 1.25, "noise": 0.1}
    steps = {
        "DDP + AdamW": row | {"time": 1.0, "ms": 8.0}, "DDP + AdamW again": row, "ZeroOptimizer 1": row,
        "ZeroOptimizer 2": row, "ZeroOptimizer 1, 4 passes": {"sent": 1.0},
    }  # fmt: skip
    memory = {name: {"start": 1.0, "peak": 2.0} for name in ("DDP + AdamW", "ZeroOptimizer 1", "ZeroOptimizer 2")}
    found = suites.zero_figures({"paper": [], "steps, 2 ranks": steps, "memory, 2 ranks": memory})
    assert len(found) == 2 * 4
    time = next(f for f in found if f.group == "step time")
    assert (time.advantage, time.noise) == (pytest.approx(0.8), 0.1)
    beside = {f"{what} {peer}": 0.5 for what in ("time /", "noise of") for peer in ("DDP", "DeepSpeed")}
    few = {name: {"seconds": 0.01} | beside for name in ("DDP + AdamW", "ZeroOptimizer 1", "ZeroOptimizer 2")}
    found = suites.zero_figures({"tokens, 4 ranks": {"8": few, "64": few | {"DeepSpeed 2": {"seconds": 0.02}}}})
    assert [f.peer for f in found] == ["DDP + AdamW"] * 2 + ["DDP + AdamW", "DeepSpeed 2"] * 2
    assert [(f.ours, f.theirs, f.advantage, f.noise) for f in found[-1:]] == [(10.0, 20.0, 2.0, 0.5)]
    assert found[-1].name == "ZeroOptimizer 2, 4 ranks, 64 tokens a rank, beside DeepSpeed 2"
    kernel = {"target": "sm_90", "kernel": "k", "instructions_a_weight": 4.0, "aim": 5.0, "spills": 0}
    peer = {"target": "sm_90", "kernel": "theirs", "instructions_a_weight": 8.0}
    data = {"kernels": [kernel], "peers": [peer], "operations": [{"name": "o", "launches": 2}], "notes": ["text"]}
    assert [(f.name, f.ours, f.advantage) for f in suites.kernel_figures(data)] == [
        ("k", 4.0, 1.25), ("theirs", 8.0, None), ("o", 2, None),
    ]  # fmt: skip
    assert [f.name for f in suites.kernel_figures([kernel])] == ["k"]
    with pytest.raises(ValueError, match="no rows"):
        suites.kernel_figures({"other": 1})


def test_numbers_are_short() -> None:
    assert [figures.number(v) for v in (None, 3.0, 1234567, 0.012345, 12.345, 1234.5)] == [
        "-", "3", "1,234,567", "0.0123", "12.3", "1,234",
    ]  # fmt: skip
