"""Walking along the causes of an error ends, also where they form a ring."""

from nemo_automodel.errors import causes


def chained(first, last):
    last.__cause__ = first
    return last


def test_each_cause_comes_once_from_the_last_to_the_first():
    first, last = KeyError("first"), ValueError("last")
    assert list(causes(chained(first, last))) == [last, first]


def test_a_ring_is_walked_once():
    first, last = KeyError("first"), ValueError("last")
    chained(last, first)
    assert list(causes(chained(first, last))) == [last, first]


def test_what_was_being_handled_stands_for_a_cause():
    error = ValueError("last")
    error.__context__ = first = KeyError("first")
    assert list(causes(error)) == [error, first]


def test_no_error_has_no_cause():
    assert list(causes(None)) == []
