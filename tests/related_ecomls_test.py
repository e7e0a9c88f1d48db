"""EcoMLS against its rules written out, and against what could embarrass it."""

import importlib
import math

import numpy as np
import pretrained_tiny
import pytest
from ml_collections import ConfigDict

from swe_prune.errors import InputError
from swe_prune.related.ecomls import Profile, Served, Switcher, Trace, coin, compare, serve

PROFILES = {"dense": Profile(3.0, 5.0, 0.8), "half": Profile(1.0, 3.0, 0.75)}


def test_a_model_that_does_as_profiled_stays():
    switcher = Switcher(PROFILES, epsilon=1.0)
    assert switcher.observe(4.0, 0.8) == "dense"


def test_a_costly_model_gives_way_to_a_cheaper_one_of_nearly_its_confidence():
    assert Switcher(PROFILES, epsilon=0.0).observe(5.1, 0.8) == "half"
    unsure = PROFILES | {"half": Profile(1.0, 3.0, 0.69)}
    assert Switcher(unsure, epsilon=0.0).observe(5.1, 0.8) == "dense"


def test_an_unsure_model_gives_way_to_the_best_of_the_surer_ones():
    profiles = PROFILES | {"big": Profile(20.0, 20.0, 0.95)}
    # Scores: dense 4 * 0.2 = 0.8, big 20 * 0.05 = 1.0; both are surer than 0.4.
    assert Switcher(profiles, start="half", epsilon=0.0).observe(2.0, 0.4) == "dense"


def test_what_a_model_took_last_counts_in_place_of_its_profile():
    profiles = {"a": Profile(4, 4, 0.8), "b": Profile(3, 3, 0.8), "c": Profile(2.9, 2.9, 0.8)}
    switcher = Switcher(profiles, start="b", epsilon=0.0, window=1)
    assert switcher.observe(1.0, 0.8) == "b"  # b is remembered at 1 J
    switcher.current = "a"
    assert switcher.observe(6.0, 0.8) == "b"


def test_only_the_last_requests_are_averaged():
    switcher = Switcher(PROFILES, epsilon=0.0, window=2)
    for _ in range(50):
        switcher.observe(4.0, 0.8)
    assert switcher.observe(6.0, 0.8) == "dense"  # (4 + 6) / 2 is not above 1.25 * 4
    assert switcher.observe(6.0, 0.8) == "half"


def test_where_a_switch_is_due_epsilon_of_them_are_random():
    chosen = [Switcher(PROFILES, epsilon=0.5, seed=s).observe(6.0, 0.8) for s in range(400)]
    assert 0.17 < chosen.count("dense") / 400 < 0.33  # half of the random half


def traces(n=300):
    random = np.random.default_rng(0)
    load = 1 + (np.arange(n) % 100 > 60) * 0.6  # now and then everything costs more
    noise = random.normal(0, 0.02, (2, n))
    return {
        "dense": Trace(4 * load, 0.8 + noise[0], np.full(n, 0.9)),
        "half": Trace(2 * load, 0.75 + noise[1], np.full(n, 0.85)),
    }


def test_the_table_has_the_simple_baselines_and_is_the_same_again():
    found = compare(traces(), PROFILES)
    assert list(found) == [
        "EcoMLS, ε = 0.2", "EcoMLS, ε = 0.3", "EcoMLS, ε = 0.4",
        "always dense", "always half", "random",
    ]  # fmt: skip
    assert [len(some) for some in found.values()] == [3, 3, 3, 1, 1, 3]
    (dense,), (half,) = found["always dense"], found["always half"]
    assert dense.shares == {"dense": 1.0, "half": 0.0}
    for served in found["EcoMLS, ε = 0.2"]:
        assert half.joules < served.joules < dense.joules
        assert half.quality < served.quality < dense.quality
        assert sum(served.shares.values()) == pytest.approx(1)
    assert compare(traces(), PROFILES) == found


def test_a_coin_of_the_same_energy_mixes_the_best_two():
    alone = [Served(*one, {}) for one in ((4.0, -1.0), (3.0, -1.9), (2.0, -2.0))]
    assert coin(alone, 3.5) == pytest.approx(-1.25)  # of the first and the third
    assert coin(alone, 9.0) == -1.0
    assert coin(alone, 2.0) == -2.0
    assert math.isnan(coin(alone, 1.0))


def test_serving_is_the_mean_of_what_was_chosen():
    recorded = {"a": Trace([1, 2], [0, 0], [5, 6]), "b": Trace([10, 20], [0, 0], [50, 60])}
    order = iter(["b", "a"])
    found = serve(recorded, lambda *_: next(order), "a")
    assert found == Served(10.5, 32.5, {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Profile(2.0, 1.0, 0.5), "low <= high"),
        (lambda: Profile(1.0, 2.0, 1.5), "between 0 and 1"),
        (lambda: Switcher({"dense": PROFILES["dense"]}), "at least two models"),
        (lambda: Switcher(PROFILES, start="big"), "start must be one of"),
        (lambda: Switcher(PROFILES, epsilon=2.0), "epsilon"),
        (lambda: Switcher(PROFILES, window=0), "window"),
        (lambda: serve({"a": Trace([1], [0], [])}, lambda *_: "a", "a"), "same requests"),
        (lambda: serve({"a": Trace([], [], [])}, lambda *_: "a", "a"), "at least one"),
        (lambda: serve({"a": Trace([1], [0], [1])}, lambda *_: "a", "b"), "no trace of model 'b'"),
        (lambda: Switcher(PROFILES).observe(-1.0, 0.5), "joules must be 0 or more, got -1"),
        (lambda: Switcher(PROFILES).observe(1.0, 1.5), "confidence must be between 0 and 1"),
        (lambda: Trace([-1.0], [0.5], [0.0]), "joules must be 0 or more"),
        (lambda: Trace([1.0], [5.0], [0.0]), "confidence must be between 0 and 1, got 5.0 to 5.0"),
        (lambda: compare({}, PROFILES, seeds=()), "seeds must be one or more different"),
        (lambda: compare({}, PROFILES, seeds=(0, 0)), "seeds must be one or more different"),
        (lambda: compare({}, PROFILES, epsilons=(0.2, 0.20000001)), "epsilons must be one or more"),
    ],
)
def test_what_cannot_be_served_is_refused(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


@pytest.mark.slow
def test_the_benchmark_serves_real_requests_of_a_tiny_model(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.syspath_prepend(str(pretrained_tiny.ROOT / "benchmarks"))
    benchmark = importlib.import_module("ecomls")
    place = pretrained_tiny.make(tmp_path)
    given = ConfigDict(
        {
            "model": str(place.model), "shares": (0.5,), "text": str(place.held_out),
            "calibration": str(place.train), "calibration_windows": 8, "length": 16,
            "requests": 6, "profiled": 2, "prompt": 8, "new": 4, "epsilons": (0.2,), "window": 2,
            "seeds": (0, 1),
        }
    )  # fmt: skip
    found = benchmark.run(given, lambda _: None)
    assert list(found["traces"]) == ["dense", "cut 50%"]
    for trace in found["traces"].values():
        assert [len(values) for values in trace.values()] == [6, 6, 6]
        assert min(trace["joules"]) > 0
        assert all(0 < one <= 1 for one in trace["confidence"])
    (dense,), (small,) = found["ways"]["always dense"], found["ways"]["always cut 50%"]
    assert dense["quality"] != small["quality"]
    assert sum(found["live"]["shares"].values()) == pytest.approx(1)
    assert benchmark.table(found).row_count == 5
