"""The guard between calibration and evaluation, against a search that looks at everything."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from swe_prune.data.overlap import check_disjoint, overlap
from swe_prune.errors import InputError

A, B = (np.random.default_rng(seed).integers(0, 5000, 3000) for seed in (0, 1))
LETTERS = "abcdefghijklmnopqrstuvwxyz     "


def prose(seed, length=4000):
    symbols = np.random.default_rng(seed).choice(list(LETTERS), length)
    return " ".join("".join(symbols).split())


def by_looking(first, second, n):
    grams = {tuple(second[i : i + n]) for i in range(len(second) - n + 1)}
    return any(tuple(first[i : i + n]) in grams for i in range(len(first) - n + 1))


@hypothesis.given(
    first=st.lists(st.integers(0, 2), max_size=40),
    second=st.lists(st.integers(0, 2), max_size=40),
    n=st.integers(4, 9),
)
@hypothesis.settings(deadline=None)
def test_nothing_is_missed_and_nothing_made_up(first, second, n):
    found = overlap(np.array(first, int), np.array(second, int), n=n)
    same = first == second and n / 4 <= len(first) < n
    assert (found is not None) == (by_looking(first, second, n) or same)
    if found is not None:
        at, to, length = found.first[1], found.second[1], found.length
        assert first[at : at + length] == second[to : to + length]
        assert length >= n or same
        assert first[at + length : at + length + 1] != second[to + length : to + length + 1] or (
            max(at, to) + length >= min(len(first), len(second))
        )


@hypothesis.given(
    length=st.integers(50, 400),
    at=st.integers(0, 2000),
    to=st.integers(0, 2000),
    rows=st.booleans(),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_a_passage_that_was_put_in_is_found_where_it_is(length, at, to, rows):
    # By chance the texts may agree right before or after the passage, which is longer then.
    before = at > 0 and to > 0 and A[at - 1] == B[to - 1]
    hypothesis.assume(not before and A[at + length] != B[to + length])
    copied = B.copy()
    copied[to : to + length] = A[at : at + length]
    given_first, given_second = (A.reshape(3, -1), copied) if rows else (A, copied)
    found = overlap(given_first, given_second)
    whole = [max(0, min(at + length, (r + 1) * 1000) - max(at, r * 1000)) for r in range(3)]
    if rows and max(whole) < 50:
        assert found is None  # it was cut by the ends of the windows
        return
    start = at if not rows else next(max(at, r * 1000) for r in range(3) if whole[r] >= 50)
    assert found.unit == "tokens"
    assert found.first == ((start // 1000, start % 1000) if rows else (0, at))
    assert found.second == (0, to + start - at)
    assert found.length == (whole[start // 1000] if rows else length)
    if not rows:
        np.testing.assert_allclose(found.share, (length - 49) / (3000 - 49), rtol=1e-9)


def test_one_symbol_less_than_a_passage_is_no_overlap():
    copied = B.copy()
    copied[100:149] = A[7:56]
    assert overlap(A, copied) is None
    check_disjoint(A, copied)
    copied[149] = A[56]
    assert overlap(A, copied).length == 50


def test_common_phrases_do_not_trigger():
    phrase = "It is a truth universally acknowledged, that a single man in possession of a good "
    assert len(phrase) < 200
    check_disjoint(prose(0) + phrase + prose(1), prose(2) + phrase + prose(3))
    check_disjoint([" = Notes = ", prose(0)], [" = Notes = ", prose(1)])


def test_text_that_is_wrapped_otherwise_is_the_same_text():
    passage = prose(4, 300)
    wrapped = passage.replace(" ", " \r\n\t")
    first, second = prose(5) + "\n\n" + passage, prose(6, 100) + " " + wrapped + prose(7)
    found = overlap(first, second)
    assert found.unit == "characters"
    assert found.first == (0, len(first) - len(passage) - 2)  # the white space before it, too
    assert found.second == (0, second.index(wrapped) - 1)
    assert found.length >= len(passage)


def test_a_short_text_overlaps_only_as_a_whole():
    short = prose(8, 120)
    assert overlap([prose(9), short], [short, prose(10)]).first == (1, 0)
    assert overlap([prose(9), short], [short, prose(10)]).share == 0.5
    assert overlap([short], [short + " and more"]) is None
    assert overlap([short[:20]], [short[:20]]) is None


def test_the_refusal_says_what_and_where():
    text = prose(11)
    with pytest.raises(InputError) as error:
        check_disjoint([prose(12), prose(13) + text[500:800]], text)
    sentence = str(error.value)
    assert "300 characters of the calibration text from position" in sentence
    assert "of text 1" in sentence
    assert "from position 500 (" in sentence
    assert text[500:540] in sentence
    assert "calibrate on other text" in sentence
    assert "\n" not in sentence
    with pytest.raises(InputError, match=r"3000 tokens .* 100\.00% of what is evaluated on"):
        check_disjoint(A, A)


@pytest.mark.parametrize(
    ("first", "second", "n", "sentence"),
    [
        ("text", np.arange(9), None, "one of the two is text"),
        (["text", np.arange(3)], "text", None, "mixed"),
        ("text", "text", 0, "n = 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(first, second, n, sentence):
    with pytest.raises(InputError, match=sentence):
        overlap(first, second, n=n)


def test_nothing_overlaps_with_nothing():
    assert overlap("", "") is None
    assert overlap([], [A]) is None
    assert overlap(np.zeros(0, int), A) is None


def test_every_kind_of_text_is_taken():
    rows = [list(map(int, A[:60])), list(map(int, B[:70]))]
    assert overlap(rows, B).first == (1, 0)
    assert overlap(list(map(int, A)), A[5:].astype(np.uint16)).first == (0, 5)
