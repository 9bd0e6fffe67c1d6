"""Patterns from files: those of use pass, and none that passes takes long."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.expressions import MOST, check_bounded
from phicore.modules import ends_with

OF_USE = [
    r".*\.(q|k|v)_proj",
    r"^(?!.*visual).*(?:q_proj|v_proj).*",
    r"model\.layers\.\d+\.(?:self_attn|mlp)\.[a-z_]+",
    # what a popular trainer writes
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2)))",
    "|".join(re.escape(f"model.layers.{i}.self_attn.q_proj") for i in range(400)),
    r"[^]a\]]+x[\]]+",
    r"(?P<a>x)y(?#c()\d",
    r"(?i)abc.*",
    r"a{3}b{2,}c{,3}d{4",
    r"\{3(?:a.b){2}(?:q|k)+",
    "",
]
HOSTILE = [
    "(a+)+b",
    "(a|b*)*",
    "(?=(a+)+)b",
    "(?:a+){2,}",
    "((a{2,3}){2,3})",
    "(?:.|.|.)*!",
    r"(?:\w|\.)+",
    ".*.*.*.*.*x",
    "(?:.*){9}",
    "a?" * 30 + "a" * 30,
    "(?:.|.|.|.|.|.|.|.)" * 10,
    "".join(f"(?:{c}|{c}|{c})" for c in "modellayersselfattn"),
    # alternatives that begin alike though they do not look it
    "(?:a?b|c?b|d?b|e?b|f?b|g?b|h?b|i?b)" * 20 + "x",
    "(?:a{0}b|c{0}b)*x",
    "(?i:(?:ab|AB)*)x",
    "(?i)(?:sb|\u017fb)*x",  # the long s, which is an s where case is nothing
    "|".join(f"a.*.*.*.*x{i}" for i in range(100)),
    r"(a+)\1",
    "(?P<a>a+)(?P=a)",
    "(a)?(?(1)b|c)",
    "(?x) a+ # (",
    "(" * 400 + ")" * 400,
]


@pytest.mark.parametrize("expression", OF_USE)
def test_patterns_of_use_pass(expression):
    re.compile(expression)
    assert check_bounded("", expression) < 2 << MOST


@pytest.mark.parametrize("expression", HOSTILE)
def test_hostile_patterns_are_named(expression):
    re.compile(expression)
    with pytest.raises(ValueError, match=r"target_modules: the pattern .* might take very long to match: "):
        check_bounded("target_modules", expression)


PIECES = st.recursive(
    st.sampled_from(("a", ".", r"\w", "[a-z]", r"\.", "l")),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(("*", "+", "?", "{2}", "{1,3}", "*?"))).map(lambda p: f"(?:{p[0]}){p[1]}"),
    ),
    max_leaves=14,
)


@given(expression=PIECES)
def test_a_pattern_that_passes_is_matched_soon(expression):
    """Never fails by a little: without the bound these patterns take hours."""
    expression = ends_with(f"{expression}!")
    try:
        check_bounded("", expression)
    except ValueError:
        return
    start = time.process_time()
    re.fullmatch(expression, "model.layers.10.self_attn.q_proj" + "a" * 40)
    assert time.process_time() - start < 10
