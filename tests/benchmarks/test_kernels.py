"""The static report of one small kernel on two targets, and times with a stand-in for the timer."""

import json
from unittest import mock

import pytest
import torch

from benchmarks import kernel_code, kernel_peers, kernels
from phicore_kernels.aot import Compiled, amd_code, nvidia_code
from tests.kernels.interpreted import Interpreter


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    copy = directory / "copy.json"
    arguments = ["--static", "--kernels", "encode_blocks bfloat16", "--output", str(directory), "--json", str(copy)]
    assert kernels.main([*arguments, "--targets", "sm_90", "gfx942"]) == 0
    assert copy.read_text() == (directory / "static.json").read_text()
    assert (directory / "static.png").stat().st_size > 1000
    return json.loads(copy.read_text())


def test_report_of_one_kernel(report):
    nvidia, amd = report["kernels"]
    assert (nvidia["target"], amd["target"]) == ("sm_90", "gfx942")
    assert 10 < nvidia["instructions_a_weight"] <= nvidia["aim"] == 25
    assert 1 <= nvidia["memory_instructions_a_weight"] < nvidia["instructions_a_weight"]
    assert nvidia["spills"] == amd["spills"] == nvidia["tensor_core_instructions"] == 0
    # 70 registers are given as 72: seven programs of four warps fit into 65,536
    assert nvidia["registers"] in range(65, 81)
    assert nvidia["warps_a_multiprocessor"] == 4 * (65536 // (-(-nvidia["registers"] // 8) * 8 * 128))
    assert nvidia["occupancy"] == round(nvidia["warps_a_multiprocessor"] / 64, 3)
    assert nvidia["bytes_read_a_weight"] == amd["bytes_read_a_weight"] == 2.0
    for row in (nvidia, amd):
        assert sum(row["instructions_a_weight_by_kind"].values()) == pytest.approx(
            row["instructions_a_weight"], abs=0.05
        )
    assert nvidia["instructions_a_weight_by_kind"]["memory"] == nvidia["memory_instructions_a_weight"]
    assert 10 < amd["instructions_a_weight"] < 100
    assert 0 < amd["memory_instructions_a_weight"] < amd["instructions_a_weight"]
    assert 0 < amd["occupancy"] <= 1
    assert amd["aim"] is None
    text = kernels.table(report)
    assert "missed" not in text
    assert "least bytes to read for a weight: 0.516" in text
    assert all(row["kernel"] in text for row in report["peers"])


def test_bitsandbytes_library_is_read(report):
    peers = {row["kernel"]: row for row in report["peers"] if row["target"] == "sm_90"}
    assert report["notes"] == []
    # what its 0.50 takes, of which half a dozen versions of CUDA differ by a few per cent
    expected = {
        "dequantise": 24, "product, 1 rows": 8.7, "product, 4 rows": 20.3, "product, 8 rows": 36.8,
        "product 32x64x128": 8.1, "product 128x128x64": 10.8,
    }  # fmt: skip
    for name, instructions in expected.items():
        assert peers[f"bitsandbytes: {name}"]["instructions_a_weight"] == pytest.approx(instructions, rel=0.05)
    assert peers["bitsandbytes: product 128x128x64"]["tensor_core_instructions"] == 64
    assert peers["bitsandbytes: product, 1 rows"]["bytes_read_a_weight"] == 0.5159
    assert peers["bitsandbytes Triton: dequantise"]["instructions_a_weight"] == pytest.approx(35, rel=0.1)
    assert peers["bitsandbytes Triton: quantise"]["instructions_a_weight"] == pytest.approx(50, rel=0.1)
    amd = [row["kernel"] for row in report["peers"] if row["target"] == "gfx942"]
    assert amd == ["bitsandbytes Triton: dequantise", "bitsandbytes Triton: quantise"]


def test_operations(report):
    found = {row["name"]: row for row in report["operations"]}
    ours, theirs = found["dequantise"], found["bitsandbytes: dequantise"]
    assert (ours["launches"], ours["temporary_bytes"]) == (1, 0)
    assert ours["bytes_read_a_weight"] == pytest.approx(kernel_code.MINIMUM_BYTES)
    assert (theirs["launches"], theirs["temporary_bytes"]) == (3, 4096 * 4096 // 64 * 4)
    assert found["bitsandbytes: dx = g W"]["launches"] == 4  # dequantise, then multiply
    assert found["bitsandbytes: dx = g W"]["temporary_bytes"] >= 2 * 4096 * 4096
    # the product and the sum of its parts; no dense W
    assert found["dx = g W, 16 rows"]["launches"] == 2
    assert found["dx = g W, 16 rows"]["temporary_bytes"] < 4 << 20
    assert found["y = x W^T with LoRA, 16 rows"]["launches"] == 3
    assert found["y = x W^T, 512 rows"]["temporary_bytes"] == 2 * 4096 * 4096


def test_what_cannot_be_read_is_said(report):
    with mock.patch.object(kernel_peers, "library", return_value=None):
        rows, notes = kernel_peers.rows("sm_90")
    assert notes == ["the installed bitsandbytes has no CUDA library"]
    assert len(rows) == 2  # its Triton kernels are there
    with mock.patch.object(kernel_peers, "find_spec", return_value=None):
        rows, notes = kernel_peers.rows("sm_90")
        assert rows == []
        assert "not installed" in notes[0]
    text = kernels.table({**report, "notes": ["sm_90: no library"]})
    assert "note: sm_90: no library" in text


def test_a_missed_aim_is_said(report):
    row = report["kernels"][0]
    assert "missed" in kernels.table({**report, "kernels": [row | {"instructions_a_weight": 25.1}]})
    assert "missed" not in kernels.table({**report, "kernels": [row | {"instructions_a_weight": 24.9}]})


def test_loops_are_found_in_both_languages():
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128 R4, [R2] ;
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/              @!P0 BRA 0x10 ;
        /*0040*/                   EXIT ;
        /*0050*/                   BRA 0x50;
    """
    compiled = Compiled("sm_90", {}, 0, 128)
    compiled.__dict__["code"] = nvidia_code(sass)
    assert [text.split()[0] for text in compiled.hot_loop()] == ["LDG.E.128", "FADD", "@!P0"]
    assembly = """
_kernel:
\tv_mov_b32_e32 v1, 0 ; comment
.LBB0_1:   ; =>This Inner Loop Header
\t.loc 1 2 3
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\tv_add_f32_e32 v1, v1, v2
\ts_cbranch_scc1 .LBB0_1
\ts_branch .LBB0_2
.LBB0_2:
\ts_endpgm
\ts_nop 0
"""
    compiled = Compiled("gfx942", {}, 0, 256)
    compiled.__dict__["code"] = amd_code(assembly)
    assert [text.split()[0] for text in compiled.hot_loop()] == [
        "global_load_dwordx4",
        "v_add_f32_e32",
        "s_cbranch_scc1",
    ]
    assert compiled.body()[-1] == "s_endpgm"


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "warps"),
    [
        ("sm_90", 168, 65536, 128, 12),  # registers: three programs of four warps
        ("sm_90", 32, 0, 128, 64),  # the hardware's limit
        ("sm_86", 32, 40 << 10, 128, 8),  # shared memory: two programs
        ("gfx942", 130, 0, 256, 12),  # 512 registers of a lane hold three waves of 136; four SIMDs
        ("gfx942", 64, 40 << 10, 256, 4),  # LDS: one program of four waves
        ("gfx1100", 96, 0, 128, 64),
    ],
)
def test_occupancy(target, registers, shared, threads, warps):
    compiled = Compiled(target, {}, shared, threads)
    compiled.__dict__["resources"] = {"registers": registers, "spills": 0}
    assert kernel_code.occupancy(compiled) == warps


def test_unknown_kernels(tmp_path, capsys):
    with mock.patch.object(kernel_peers, "rows", return_value=([], [])):
        assert kernels.main(["--static", "--kernels", "no such", "--targets", "sm_90", "--output", str(tmp_path)]) == 1
    assert "no such" in capsys.readouterr().err


# ===== times =====


def test_times_need_a_gpu(capsys):
    with mock.patch.object(torch.accelerator, "current_accelerator", return_value=None):
        assert kernels.main([]) == 1
    error = capsys.readouterr().err
    assert "found no GPU" in error
    assert "--static" in error


def test_times_with_the_interpreter_for_a_gpu(tmp_path):
    interpreter = Interpreter()
    try:
        printed = interpreter.call("tests.kernels.interpreted:time_small", str(tmp_path))
    finally:
        interpreter.pool.shutdown()
    report = json.loads((tmp_path / "times.json").read_text())
    assert (tmp_path / "copy.json").read_text() == (tmp_path / "times.json").read_text()
    assert report["settings"]["bitsandbytes"]
    times = report["times"]
    names = {"dense", "phicore", "phicore, decoded inside", "phicore, dequantised first", "bitsandbytes"}
    for operation, contenders in {
        "forward": names,
        "backward": names,
        "forward with LoRA": {"dense", "phicore", "bitsandbytes"},
    }.items():
        for m in (1, 20):
            assert {t["contender"] for t in times if (t["operation"], t["rows"]) == (operation, m)} == contenders
    assert max(t["error"] for t in times) < 0.02
    row = next(t for t in times if t["contender"] == "phicore" and t["rows"] == 20 and t["operation"] == "forward")
    assert (row["ms"], row["ms_p20"], row["ms_p80"]) == (2.0, 1.0, 3.0)
    moved = kernel_code.MINIMUM_BYTES * 64 * 128 + 2 * 20 * (64 + 128)
    assert row["gb_a_second"] == pytest.approx(moved / 2e-3 / 1e9)
    assert row["tflop_a_second"] == pytest.approx(2 * 20 * 64 * 128 / 2e-3 / 1e12)
    # the stand-in timer says 2 ms for the copy and the product that make the roof, of 16 x 16 numbers
    assert row["roofline_ms"] == pytest.approx(
        max(moved / (2 * 512 / 2e-3), 2 * 20 * 64 * 128 / (2 * 16**3 / 2e-3)) * 1e3
    )
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        "times-backward.png", "times-forward-with-LoRA.png", "times-forward.png"
    ]  # fmt: skip
    assert "20 rows  backward           bitsandbytes" in printed


def test_a_wrong_result_is_not_timed():
    from benchmarks import kernel_times

    def wrong(w, m, peers):
        yield kernel_times.Contender("forward", "dense", lambda: torch.ones(2), 1.0)
        yield kernel_times.Contender("forward", "phicore", lambda: torch.tensor([1.0, 1.1]), 1.0)

    roof = kernel_times.Roof(1.0, 1.0)
    with (
        mock.patch.object(kernel_times, "contenders", wrong),
        pytest.raises(RuntimeError, match=r"q, 3 rows, forward: phicore differs from dense by 7\.07%"),
    ):
        kernel_times.measure({"q": (4, 4)}, (3,), torch.device("cpu"), lambda _: (1.0, 1.0, 1.0), roof, False)


def test_the_layers_are_those_of_the_models():
    import transformers

    from benchmarks.kernel_times import LAYERS, ROWS

    assert ROWS[0] == 1
    assert ROWS[-1] == 8192
    mini = transformers.Phi3Config()  # Phi-3-mini is transformers' default
    assert LAYERS["Phi-3-mini"]["gate_up"] == (2 * mini.intermediate_size, mini.hidden_size)
    assert LAYERS["Phi-3-mini"]["qkv"] == (3 * mini.hidden_size, mini.hidden_size)
