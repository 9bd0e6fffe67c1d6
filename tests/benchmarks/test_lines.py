"""The rule by which lines of code are counted."""

from benchmarks import lines

SOURCE = '''"""A docstring
of two lines."""

# a comment
import os  # code, with a comment

TEXT = """counted:
a string that is used"""


class Class:
    """Not counted."""

    def method(self):
        "Nor this."
        return os.path.join(
            "a",

            "b",  # three lines of code with a blank one between
        )
'''


def test_code_is_counted_and_nothing_else() -> None:
    assert lines.code_lines(SOURCE) == 1 + 2 + 1 + 1 + 4
    assert lines.code_lines("") == 0
    assert lines.code_lines("# only this\n\n") == 0


def test_peers_that_are_not_installed_are_left_out() -> None:
    assert lines.count(["no_such_package/file.py"]) is None
    assert (lines.count(["phicore/adapters"]) or 0) > 500
    assert {figure.name for figure in lines.measure()} == set(lines.COMPONENTS)
