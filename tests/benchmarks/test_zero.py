"""The trace of a step: that gradients travel while the backward pass goes on, and how that is counted."""

import json
from typing import Any

from benchmarks import zero


def event(name: str, start: float, stop: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": start, "dur": stop - start}


def test_overlap_is_counted_in_time_that_any_reduction_covers():
    engine = "autograd::engine::evaluate_function: "
    events = [
        event(engine + "AddmmBackward0", 10, 20),
        event("aten::mm", 0, 100),
        event(engine + "AccumulateGrad", 25, 30),
        event("gloo:all_to_all", 15, 22),
        event("gloo:all_to_all", 18, 24),  # beside the first: 15 to 24
        event("nccl:reduce_scatter", 28, 36),
        event("gloo:broadcast", 40, 50),
        {"ph": "i", "name": "gloo:all_to_all", "ts": 0},
    ]
    assert zero.overlap(events) == {"backward": 20, "reducing": 17, "within": 11, "others": 10}


def test_the_trace_of_a_real_step_shows_overlap(tmp_path, capsys):
    path = tmp_path / "trace.json"
    zero.on_ranks(2, zero.write_trace, str(path))
    found = zero.overlap(json.loads(path.read_text())["traceEvents"])
    assert 0 < found["within"] <= found["reducing"]
    assert found["others"] > 0
    zero.print_overlap(str(path))
    assert "within it" in capsys.readouterr().out


def test_making_the_optimizer_needs_memory_for_one_bucket():
    bucket = 1 / zero.LAYERS  # of the parameters
    for costs in zero.on_ranks(2, zero.measure_memory, "ZeroOptimizer 2"):
        assert costs["start"] < 1.3 * bucket
