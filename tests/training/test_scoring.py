"""Scores: bounds, the reference formula on sets, and what a line must look like to be a span."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.training.scoring import exact_match, parse_spans, span_f1

words = st.text(alphabet="abcXY é日", min_size=1, max_size=6).filter(lambda text: text.strip())
spans = st.lists(st.tuples(words, words), max_size=5)


def lines(pairs: list[tuple[str, str]]) -> str:
    return "\n".join(f"{label}: {value}" for label, value in pairs)


def folded(pairs: list[tuple[str, str]]) -> Counter[tuple[str, str]]:
    return Counter((" ".join(label.split()), " ".join(value.split())) for label, value in pairs)


@given(spans)
def test_parse_spans_reads_what_lines_write(pairs: list[tuple[str, str]]) -> None:
    assert parse_spans(lines(pairs)) == folded(pairs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("City: Paris\nCity: Paris", {("City", "Paris"): 2}),
        ("  Road :\t12   Main\u00a0St \r\nCity:Paris", {("Road", "12 Main St"): 1, ("City", "Paris"): 1}),
        ("Time: 12:30", {("Time", "12:30"): 1}),
        ("no span here\n: nothing before\nnothing after:\n\n:", {}),
        ("", {}),
    ],
)
def test_parse_spans_of_odd_lines(text: str, expected: dict[tuple[str, str], int]) -> None:
    assert parse_spans(text) == expected


# Few labels and texts, so that predictions and references share some.
shared = st.lists(st.tuples(st.sampled_from(["A", "B  C"]), st.sampled_from(["x", "x y", "日"])), max_size=5)


@given(st.lists(st.tuples(shared, shared), max_size=4))
def test_span_f1_is_the_harmonic_mean_of_micro_precision_and_recall(texts: list[tuple[list, list]]) -> None:
    predictions, references = [lines(p) for p, _ in texts], [lines(r) for _, r in texts]
    predicted = sum(len(p) for p, _ in texts)
    expected = sum(len(r) for _, r in texts)
    right = sum(min(n, folded(r)[span]) for p, r in texts for span, n in folded(p).items())
    f1 = span_f1(predictions, references)
    if expected == 0:
        assert f1 is None
    elif right == 0:
        assert f1 == 0.0
    else:
        precision, recall = right / predicted, right / expected
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall))


@given(st.lists(spans, min_size=1, max_size=4))
def test_references_score_themselves_perfectly(texts: list[list[tuple[str, str]]]) -> None:
    references = [lines(pairs) for pairs in texts]
    assert exact_match(references, references) == 1.0
    assert span_f1(references, references) == (1.0 if any(texts) else None)


def test_span_f1_counts_each_expected_span_once_and_within_its_own_text() -> None:
    assert span_f1(["A: x\nA: x"], ["A: x"]) == pytest.approx(2 / 3)
    assert span_f1(["B: y", "A: x"], ["A: x", "B: y"]) == 0.0
    assert span_f1(["", "A: x"], ["B: y", "A: x"]) == pytest.approx(2 / 3)
    assert span_f1(["nothing"], ["A: x"]) == 0.0
    assert span_f1(["A: x"], ["nothing"]) is None


def test_exact_match_strips_and_averages() -> None:
    assert exact_match([" a\n", "b", "c d", ""], ["a", "B", "c  d", "  "]) == 0.5


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        exact_match(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="0 predictions for 1 references"):
        span_f1([], ["a"])
    with pytest.raises(ValueError, match="nothing to score"):
        exact_match([], [])
    assert span_f1([], []) is None
