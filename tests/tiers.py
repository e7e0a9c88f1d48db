"""Which cases of a test run every time; the others are slow and run with `make test-all`."""

import pytest


def only(cases, *quick):
    """Returns parameters of which those that are not in `quick` are marked slow."""
    missing = [case for case in quick if case not in cases]
    assert not missing, missing
    return [_param(case, case in quick) for case in cases]


def first(cases, n):
    """Returns parameters of which all but the first n are marked slow."""
    return [_param(case, number < n) for number, case in enumerate(cases)]


def _param(case, quick):
    values = case if type(case) is tuple else (case,)  # an optax transformation is a tuple too
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)
