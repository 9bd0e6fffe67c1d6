"""Scores of generated text against references: exact match, and F1 over labelled spans."""

from collections import Counter
from collections.abc import Sequence

Span = tuple[str, str]
"""What stands before and behind a line's first colon, both with whitespace folded."""


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of predictions that equal their reference once both are stripped.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    _check_lengths(predictions, references)
    if not references:
        raise ValueError("there is nothing to score: predictions and references are empty")
    return sum(p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)) / len(references)


def parse_spans(text: str) -> Counter[Span]:
    """The labelled spans of a text, with how often each occurs.

    A line "label: text" (or "text: label", the score is the same) is a span: what stands before its first colon, and
    what stands after it, both with whitespace folded to single spaces. Any other line (no colon, or nothing on one side
    of it) is none.
    """
    pairs = (line.partition(":") for line in text.splitlines())
    spans = ((_fold(label), _fold(value)) for label, _, value in pairs)
    return Counter((label, value) for label, value in spans if label and value)


def span_f1(predictions: Sequence[str], references: Sequence[str]) -> float | None:
    """Micro-averaged F1 over the spans of all texts, 2 * right / (predicted + expected).

    A span is right when the same text's reference holds it; one that is predicted twice and expected once is right
    once.

    Returns:
        0.0 (nothing is right) to 1.0, or None when the references hold no span, so that there is nothing to find.

    Raises:
        ValueError: the two differ in length.
    """
    _check_lengths(predictions, references)
    pairs = [(parse_spans(p), parse_spans(r)) for p, r in zip(predictions, references, strict=True)]
    expected = sum(reference.total() for _, reference in pairs)
    if expected == 0:
        return None
    predicted = sum(prediction.total() for prediction, _ in pairs)
    right = sum((prediction & reference).total() for prediction, reference in pairs)
    return 2 * right / (predicted + expected)


def _fold(text: str) -> str:
    return " ".join(text.split())


def _check_lengths(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(
            f"got {len(predictions)} predictions for {len(references)} references; give one prediction a reference"
        )
