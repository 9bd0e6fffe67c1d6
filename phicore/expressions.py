"""Regular expressions that others wrote: how long matching a name against one can take.

Python's `re` tries one way after another, and a pattern of a few characters can have more ways than there is time for:
(a+)+b, or .*.*.*.*.*.*b. An adapter's configuration file may come from anyone, so its patterns are bounded before they
are used. `re` knows no time limit; the bound here is on the ways that a pattern leaves open.
"""

import re
from collections import Counter

MOST = 24  # bits: 2^24 ways take about 0.1 s a name
_REPEATS = (0, 6, 12, 17, 21)  # bits of so many repeats one after another: ways to share out a name of 80 characters

_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(?:(,)(\d*))?\}")


def check_bounded(what: str, expression: str) -> int:
    """How many ways of matching a regular expression leaves open, at most about, for a name of 80 characters.

    Args:
        what: where the pattern stands, for the message.
        expression: a valid regular expression.

    Returns:
        The number of ways, below 2^(MOST + 1).

    Raises:
        ValueError: there are more, a part is repeated that repeats or varies itself, a group is referred back to, or
            groups stand some hundred deep in each other.
    """
    try:
        every, _ = _Scanner(what, expression).sequences()  # the outermost, which are tried one after another
    except RecursionError:
        raise _refusal(what, expression, "its groups stand too deep in each other") from None
    ways = sum(
        1 << min(bits + (_REPEATS[repeats] if repeats < len(_REPEATS) else MOST + 1), MOST + 1)
        for repeats, bits in every
    )
    if ways >= 2 << MOST:
        raise _refusal(what, expression, "too many repeats and optional parts stand one after another")
    return ways


def _refusal(what: str, expression: str, why: str) -> ValueError:
    shown = expression if len(expression) <= 80 else expression[:77] + "..."
    return ValueError(
        f"{what}: the pattern {shown!r} might take very long to match: {why}; write it more plainly, or give the whole "
        f"names of the modules"
    )


class _Scanner:
    """One pass over a pattern, counting repeats and, in bits, other choices that stand one after another."""

    def __init__(self, what: str, expression: str) -> None:
        self.what, self.text, self.at = what, expression, 0

    def alternatives(self) -> tuple[int, int]:
        """Up to the end or a closing bracket: repeats without a small bound and bits of the worst alternative."""
        every, starts = self.sequences()
        # Alternatives that can begin alike may all have to be tried.
        plain = Counter(start for start in starts if start)
        alike = starts.count("") + max(plain.values(), default=0)
        return max(repeats for repeats, _ in every), max(bits for _, bits in every) + max(alike - 1, 0).bit_length()

    def sequences(self) -> tuple[list[tuple[int, int]], list[str]]:
        """The same of each alternative, and how each begins."""
        every, starts = [(0, 0)], [self._start()]
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "|":
                self.at += 1
                every.append((0, 0))
                starts.append(self._start())
                continue
            repeats, bits = self._atom()
            low, high = self._quantifier()
            if low != high and high != 1:
                if repeats or bits:
                    raise _refusal(self.what, self.text, "it repeats what repeats or varies itself")
                repeats = 1
            elif high is not None:
                repeats, bits = repeats * high, bits * high + (low != high)
            every[-1] = (every[-1][0] + repeats, every[-1][1] + bits)
        return every, starts

    def _start(self) -> str:
        """The plain character that comes next, in lower case, since flags may say that case is nothing; or nothing if
        it is no plain one, or may be left out."""
        found = re.compile(r"([a-zA-Z0-9_]|\\\W)(?![*?{])").match(self.text, self.at)
        return found[0].lower() if found else ""

    def _atom(self) -> tuple[int, int]:
        """One character, class or group; what of a group's inside counts."""
        text, first = self.text, self.text[self.at]
        self.at += 1
        if first == "\\":
            if text[self.at] in "123456789":
                raise _refusal(self.what, text, "it refers back to a group")
            self.at += 1
        elif first == "[":
            self.at = _CLASS.match(text, self.at - 1).end()  # type: ignore[union-attr]  # valid, so it has an end
        elif first == "(":
            opening = re.compile(r"\?(P<\w+>|P=|\(|#[^)]*|<[=!]|[=!:>]|[a-zA-Z-]+:?)").match(text, self.at)
            kind = opening[1] if opening else ""
            if kind in ("P=", "("):
                raise _refusal(self.what, text, "it refers back to a group")
            if kind[:1].isalpha() and kind[0] != "P" and "x" in kind:
                raise _refusal(self.what, text, "its flag x lets it hold comments")
            self.at = opening.end() if opening else self.at
            inner = self.alternatives()
            self.at += 1
            return inner
        return 0, 0

    def _quantifier(self) -> tuple[int, int | None]:
        """(fewest, most) repeats of what was read; None for no bound."""
        found = _QUANTIFIER.match(self.text, self.at)
        if not found or not (found[0] in "*+?" or found[1] or found[2]):
            return 1, 1
        self.at = found.end()
        if self.text[self.at : self.at + 1] in ("?", "+"):  # lazy or possessive: no more ways
            self.at += 1
        if found[0] in "*+?":
            return int(found[0] == "+"), 1 if found[0] == "?" else None
        low = int(found[1] or 0)
        return low, low if not found[2] else int(found[3]) if found[3] else None
