"""The static report: figures of one small kernel on two targets, as text, JSON and a picture."""

import json

import pytest

from benchmarks import kernels


def test_report_of_one_kernel(tmp_path, capsys):
    arguments = ["--static", "--kernels", "encode_blocks bfloat16", "--output", str(tmp_path)]
    assert kernels.main([*arguments, "--targets", "sm_90", "gfx942"]) == 0
    nvidia, amd = json.loads((tmp_path / "static.json").read_text())
    assert (nvidia["target"], amd["target"]) == ("sm_90", "gfx942")
    assert 10 < nvidia["instructions_a_weight"] <= nvidia["aim"] == 25
    assert 1 <= nvidia["memory_instructions_a_weight"] < nvidia["instructions_a_weight"]
    assert nvidia["spills"] == amd["spills"] == nvidia["tensor_core_instructions"] == 0
    # 70 registers are given as 72: seven programs of four warps fit into 65,536
    assert nvidia["registers"] in range(65, 81)
    assert nvidia["warps_a_multiprocessor"] == 4 * (65536 // (-(-nvidia["registers"] // 8) * 8 * 128))
    assert amd["instructions_a_weight"] is None
    assert (tmp_path / "static.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "missed" not in printed
    assert "bytes to read for a weight: 0.516" in printed


def test_a_missed_aim_is_said():
    row = {"target": "sm_90", "kernel": "k", "registers": 1, "spills": 0, "shared_bytes": 0, "aim": 5.5}
    row |= {"instructions_a_weight": 5.6, "memory_instructions_a_weight": 0.5}
    assert "missed" in kernels.table([row])
    assert "missed" not in kernels.table([row | {"instructions_a_weight": 5.4}])


def test_unknown_kernels_and_timings(tmp_path, capsys):
    assert kernels.main(["--static", "--kernels", "no such", "--targets", "sm_90", "--output", str(tmp_path)]) == 1
    assert "no such" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        kernels.main([])
