"""The ledger: intervals, meters, entries of attempts, factors, break-even."""

import csv
import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swe_prune import ledger
from swe_prune.errors import InputError
from swe_prune.ledger import Entry, Interval, book, factors, meters
from swe_prune.ledger.table import COLUMNS

ends = st.tuples(*[st.floats(-100, 100)] * 3).map(lambda three: Interval(*sorted(three)))
share = st.floats(0, 1)


def inside(one, part):
    return one.low + part * (one.high - one.low)


@given(ends, ends, share, share)
def test_sums_differences_and_products_hold_every_result(a, b, s, t):
    x, y = inside(a, s), inside(b, t)
    for found, exact in ((a + b, x + y), (a - b, x - y), (a * b, x * y)):
        assert found.low - 1e-9 <= exact <= found.high + 1e-9
        assert found.low <= found.value <= found.high


@given(ends, st.tuples(*[st.floats(0.1, 100)] * 3), share, share)
def test_quotients_hold_every_result(a, b, s, t):
    b = Interval(*sorted(b))
    found = a / b
    assert found.low - 1e-6 <= inside(a, s) / inside(b, t) <= found.high + 1e-6


@pytest.mark.parametrize("three", [(2, 1, 3), (0, math.nan, 1), (0, 1, math.inf)])
def test_what_is_no_interval_is_refused(three):
    with pytest.raises(InputError, match=r"low <= value <= high|finite number"):
        Interval(*three)


def test_a_division_by_what_may_be_zero_is_refused():
    with pytest.raises(InputError, match="may be 0"):
        Interval(1, 1, 1) / Interval(-1, 1, 2)


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (Interval(1234, 1300, 1400), "1.30 (1.23 to 1.40) kJ"),
        (Interval(0, 0, 0), "0.00 J"),
        (Interval(0, 500, 2000), "500 (0 to 2,000) J"),
        (Interval(-4, 1, 8), "1 (-4 to 8) J"),
        (86.5e6, "86.5 MJ"),
    ],
)
def test_a_number_has_no_more_digits_than_its_interval(number, shown):
    assert ledger.text(number, "J") == shown


def test_the_mean_of_samples_is_held_as_often_as_it_says():
    random = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        found = ledger.of_samples(random.normal(3.0, 1.0, 40), resamples=400, seed=seed)
        held += found.low <= 3.0 <= found.high
    assert 0.88 <= held / 200 <= 0.99


class Clock:
    """A clock and a counter that a test sets."""

    def __init__(self):
        self.now, self.joules = 0.0, 50.0


def counter(clock, **more):
    return meters.CounterMeter(
        "rapl", lambda: clock.joules, error=0.0, rated=100.0, clock=lambda: clock.now, **more
    )


def test_a_counter_that_wraps_counts_on():
    clock = Clock()
    meter = counter(clock, wraps_at=1000.0)
    for now, joules in ((10.0, 990.0), (11.0, 20.0)):
        clock.now, clock.joules = now, joules
        found = meter.poll()
    assert found == Interval(970.0, 970.0, 970.0)


@pytest.mark.parametrize("wraps_at", [None, 1000.0])
def test_a_counter_that_is_reset_widens_the_interval_and_never_goes_back(wraps_at):
    clock = Clock()
    meter = counter(clock, wraps_at=wraps_at)
    clock.now, clock.joules = 1.0, 0.0  # 950 J within a second cannot be
    found = meter.poll()
    assert (found.low, found.high) == (0.0, 100.0)
    clock.now, clock.joules = 2.0, 60.0
    assert meter.poll() == Interval(60.0, 110.0, 160.0)


def test_a_counter_that_leaps_is_not_believed():
    clock = Clock()
    meter = counter(clock)
    clock.now, clock.joules = 1.0, 1e12
    assert meter.poll().high == 100.0


def test_the_model_counts_idle_and_busy_threads():
    clock = Clock()
    clock.busy = 0.0
    meter = meters.ProcessorMeter(4, lambda: clock.now, lambda: clock.busy)
    clock.now, clock.busy = 10.0, 20.0
    found = meter.poll()
    assert found.value == pytest.approx(4 * 10 * 0.74 + 20 * (3.5 - 0.74))
    assert found.low < found.value < found.high


def test_an_unknown_accelerator_gets_a_wider_interval():
    clock = Clock()
    found = []
    for kind in ("NVIDIA H100 80GB HBM3", "Abacus 9000"):
        meter = meters.RatedMeter([kind], lambda: clock.now)
        clock.now += 10.0
        found.append(meter.poll())
    known, unknown = found
    assert known == Interval(700.0, 3850.0, 7000.0)
    assert unknown.low < known.low
    assert unknown.high > known.high


def test_sockets_are_read_where_they_may_be(tmp_path):
    for socket, name in enumerate(("package-0", "psys")):
        folder = tmp_path / f"intel-rapl:{socket}"
        folder.mkdir()
        for file, content in (("name", name), ("energy_uj", "5"), ("max_energy_range_uj", "9")):
            (folder / file).write_text(f"{content}\n")
    (found,) = meters.rapl(str(tmp_path / "intel-rapl:*"))
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("8\n")
    time.sleep(0.01)
    assert found.poll().value == pytest.approx(3e-6)


class Library:
    """Two GPUs as pynvml shows them, one of them without a counter."""

    class NVMLError(Exception):
        pass

    millijoules = 1000

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-{handle}"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 400_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if handle == 1:
            raise self.NVMLError
        return self.millijoules


def test_gpus_are_read_in_joules(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    library = Library()
    (found,) = meters.nvml(library)
    time.sleep(0.02)
    library.millijoules = 3000
    assert found.poll().value == pytest.approx(2.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert meters.nvml(library) == []


def test_inner_phases_are_part_of_the_outer_one(tmp_path):
    kept = ledger.Ledger(tmp_path)
    with ledger.opened(kept), ledger.measure("prune", cell="a", tokens=7) as outer:
        with ledger.measure("score"):
            sum(range(100_000))
        with ledger.measure("select"):
            pass
    inner = [entry for entry in kept.entries if not entry.top]
    assert [entry.phase for entry in inner] == ["prune/score", "prune/select"]
    assert sum(entry.seconds for entry in inner) <= outer.seconds
    assert sum(entry.joules.value for entry in inner) <= outer.joules.value
    whole = ledger.total(kept.entries)
    assert (whole.joules, whole.seconds, whole.tokens) == (outer.joules, outer.seconds, 7)
    assert [entry.phase for entry in ledger.read(tmp_path)] == [e.phase for e in kept.entries]


def test_a_phase_that_fails_is_kept_and_its_error_passes(tmp_path):
    kept = ledger.Ledger(tmp_path)
    with pytest.raises(ZeroDivisionError), ledger.opened(kept), ledger.measure("train"):
        1 / 0  # noqa: B018
    (found,) = ledger.read(tmp_path)
    assert found.status == "failed"
    assert found.seconds > 0


def test_what_a_killed_attempt_spent_is_kept_and_counted(tmp_path):
    program = (
        "import time; from swe_prune import ledger\n"
        f"book = ledger.Ledger({str(tmp_path)!r}, every=0.05)\n"
        "with ledger.opened(book), ledger.measure('train'):\n"
        "    time.sleep(0.5); print('go', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as killed:
        killed.stdout.readline()
        killed.kill()
    with ledger.opened(ledger.Ledger(tmp_path)), ledger.measure("train", tokens=10):
        pass
    found = ledger.read(tmp_path)
    assert [(e.attempt, e.status) for e in found] == [(1, "killed"), (2, "done")]
    assert 0.3 <= found[0].seconds < 60
    factors = ledger.of_country("FRA")
    assert "attempts that were killed" in ledger.summary(found, factors)
    ledger.write(tmp_path / "ledger.csv", found, factors)
    rows = list(csv.DictReader((tmp_path / "ledger.csv").read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert [row["status"] for row in rows] == ["killed", "done"]
    assert all(
        float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
        for row in rows
        for name in ("joules", "kwh", "kg_co2e", "litres")
    )


def test_processes_of_one_attempt_add_up(tmp_path):
    for process in (0, 1):
        with ledger.opened(ledger.Ledger(tmp_path, process=process)), ledger.measure("train"):
            pass
    assert [(e.attempt, e.process) for e in ledger.read(tmp_path)] == [(1, 0), (1, 1)]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "1.json").write_text(json.dumps({"began": 1.0, "entries": [{"joules": 3}]}))
    with pytest.raises(InputError, match=r"1\.json is damaged"):
        ledger.read(tmp_path)


@pytest.mark.parametrize("phase", ["", "a/b"])
def test_a_phase_needs_a_name(phase):
    with pytest.raises(InputError, match="name"), ledger.measure(phase):
        pass


def test_reading_the_meters_takes_less_than_a_thousandth_of_a_step():
    kept = ledger.Ledger()
    with ledger.opened(kept), ledger.measure("train"):
        begun = time.perf_counter()
        for _ in range(100):
            kept._read()
        once = (time.perf_counter() - begun) / 100
    # Once in EVERY seconds, whatever a step takes.
    assert once / book.EVERY < 1e-3


def test_every_country_has_a_plausible_intensity():
    found = factors.grids()
    assert len(found) > 60
    assert all(10 < factor.amount.value < 1000 for factor in found.values())
    assert all(factor.source and 2015 < factor.year < 2030 for factor in found.values())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"country": "DEX"}, "or 'DEU'"),
        ({"country": None}, "country must be a string"),
        ({"pue": 0.5}, "pue must be 1 or more"),
    ],
)
def test_factors_that_cannot_be_are_refused(given, sentence):
    with pytest.raises(InputError, match=sentence):
        ledger.of_country(**given)


def test_a_footprint_is_the_formula():
    one = Interval(1, 1, 1)
    factors = ledger.Factors(
        grid=one * 400, pue=one * 1.5, water_site=one * 2, water_grid=one * 3,
        embodied={"thread": one * 10}, lifetime=one * 1000,
    )  # fmt: skip
    spent = Entry("train", joules=one * 7.2e6, seconds=100.0, parts={"thread": 2})
    found = ledger.footprint(spent, factors)
    assert found.kwh.value == pytest.approx(3.0)
    assert found.carbon.value == pytest.approx(3.0 * 0.4 + 2 * 10 * 100 / 1000)
    assert found.water.value == pytest.approx(2.0 * 2 + 3.0 * 3)


def test_break_even_is_the_quotient_where_the_saving_is_shown():
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.2, 20)  # of the machine, the same in a pair
    dense, pruned = 2 + noise, 1.2 + noise + random.normal(0, 0.01, 20)
    found = ledger.break_even(Interval(90, 100, 120), list(dense), list(pruned))
    assert found.tokens.low <= 100 / 0.8 <= found.tokens.high
    assert found.tokens.high - found.tokens.low < 60
    assert found.of(found.tokens.value).holds_zero


def test_a_mask_is_not_shown_to_pay():
    random = np.random.default_rng(0)
    dense, masked = random.normal(2, 0.1, (2, 20))
    found = ledger.break_even(100.0, list(dense), list(masked))
    assert found.tokens is None
    assert "not shown to pay" in found.verdict
    assert "never pays" in ledger.break_even(1.0, [1.0, 1.1], [2.0, 2.1]).verdict


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((1.0, [1.0], [1.0]), "at least two"),
        ((1.0, [1.0, 2.0], [1.0]), "as many windows"),
        ((-1.0, [1.0, 2.0], [1.0, 1.0]), "spent must be 0 or more"),
        ((1.0, [1.0, math.nan], [1.0, 1.0]), "finite numbers"),
    ],
)
def test_windows_that_say_nothing_are_refused(given, sentence):
    with pytest.raises(InputError, match=sentence):
        ledger.break_even(*given)


def test_windows_go_in_turns_and_back_and_count_every_run():
    clock, order = Clock(), []
    clock.joules = 0.0

    def work(name, watts):
        def run():
            order.append(name)
            clock.now += 0.5
            clock.joules += watts * 0.5
            return 10

        return run

    works = {"dense": work("dense", 40.0), "cut": work("cut", 20.0)}
    found = ledger.windows(works, [counter(clock)], count=3, seconds=2.0, clock=lambda: clock.now)
    assert order[:2] == ["cut", "dense"]  # warm-up, backward
    assert order[2:][::4] == ["dense", "cut", "cut", "dense", "dense", "cut"]
    assert [len(some) for some in found.values()] == [3, 3]
    assert found["dense"][1] == ledger.Window(Interval(80.0, 80.0, 80.0), 2.0, 40)
    assert ledger.per_token(found["cut"]) == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"count": 0}, "count must be an integer of at least 1, got 0"),
        ({"count": 10**9}, "count must be .* at most 1000000"),
        ({"seconds": 1e9}, "seconds must be .* at most 86400"),
        ({"seconds": -1.0}, "seconds must be a finite number of at least 0"),
        ({"seconds": math.nan}, "seconds must be a finite number, got nan"),
        ({"works": {"dense": lambda: 0}}, "work 'dense' must work through tokens"),
    ],
)
def test_windows_that_cannot_be_measured_are_refused(given, sentence):
    usual = {"works": {"dense": lambda: 1}, "count": 1, "seconds": 0.0}
    with pytest.raises(InputError, match=sentence):
        ledger.windows(**{**usual, **given}, meters=[meters.ProcessorMeter()])


def test_the_idle_machine_has_the_power_of_its_threads():
    found = ledger.idle_watts([meters.ProcessorMeter(4)], 0.2)
    assert found.value == pytest.approx(4 * 0.74, rel=0.2)


def test_the_meter_s_own_error_is_common_to_cost_and_saving():
    wide = Interval(0.5, 1.0, 2.0)  # of a meter that may be off by a factor of two
    found = ledger.break_even(wide * 100, [wide * 2.0] * 20, [wide * 1.0] * 20)
    assert found.tokens == Interval(100.0, 100.0, 100.0)
    assert (found.saved.low, found.saved.high) == (0.5, 2.0)


def test_a_mask_never_pays_and_a_worse_model_not_at_equal_quality():
    windows = [2.0, 2.1, 2.0], [1.0, 1.1, 1.0]
    assert ledger.break_even(1.0, *windows, mask=True).verdict.startswith("never")
    worse = ledger.break_even(1.0, *windows, worse=Interval(0.01, 0.03, 0.04), margin=0.02)
    assert worse.verdict.startswith("not shown to pay at equal quality: its loss is 0.03")
    equal = ledger.break_even(1.0, *windows, worse=Interval(-0.02, 0.0, 0.01), margin=0.02)
    assert equal.equal
    assert "paid for itself" in equal.verdict
    with pytest.raises(InputError, match="margin must be 0 or more"):
        ledger.break_even(1.0, *windows, margin=-0.1)


def test_codecarbon_accounts_for_the_same_time_where_it_is_installed(tmp_path):
    pytest.importorskip("codecarbon")
    program = (
        "import sys; from swe_prune import ledger\n"
        "book, place = ledger.Ledger(), ledger.of_country(sys.argv[2])\n"
        "with ledger.beside(sys.argv[1], book, place, sys.argv[2], print):\n"
        "    with ledger.opened(book), ledger.measure('train'):\n"
        "        sum(range(20_000_000))\n"
    )
    for country in ("FRA", "WORLD"):
        command = [sys.executable, "-c", program, str(tmp_path / country), country]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == ""
        (found,) = ledger.read_beside(tmp_path / country)
        assert found.seconds > 0.1
        assert found.carbon / found.kwh == pytest.approx(
            ledger.of_country(country).grid.value / 1000, rel=0.01
        )
        assert 0.01 < found.kwh / found.our_kwh.value < 100


def test_a_second_source_that_fails_is_said_and_does_not_stop_the_run(tmp_path, monkeypatch):
    (tmp_path / "codecarbon.py").write_text("raise OSError('no meter')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "codecarbon", raising=False)
    said = []
    with ledger.beside(tmp_path / "out", ledger.Ledger(), ledger.of_country(), say=said.append):
        ran = True
    assert ran
    assert said == ["codecarbon does not start (no meter); its account is left out"]
    assert ledger.read_beside(tmp_path / "out") == []


def test_a_counter_that_cannot_be_read_for_a_while_widens_the_interval():
    clock = Clock()

    def reading():
        if clock.joules is None:
            raise OSError("the driver is gone")
        return clock.joules

    meter = meters.CounterMeter("nvml", reading, error=0.0, rated=100.0, clock=lambda: clock.now)
    for now, joules in ((1.0, None), (2.0, None), (3.0, 500.0), (4.0, 560.0)):
        clock.now, clock.joules = now, joules
        found = meter.poll()
    assert found == Interval(60.0, 60.0 + 150.0, 60.0 + 300.0)


@pytest.mark.parametrize("jump", [-1000.0, 0.0])
def test_a_clock_that_stands_or_goes_back_takes_nothing_away(jump):
    clock = Clock()
    clock.busy = 0.0
    every = [
        counter(clock),
        meters.ProcessorMeter(4, lambda: clock.now, lambda: clock.busy),
        meters.RatedMeter(["H100"], lambda: clock.now),
    ]
    clock.now, clock.joules, clock.busy = 10.0, 350.0, 5.0
    before = [meter.poll() for meter in every]
    clock.now, clock.joules, clock.busy = 10.0 + jump, 380.0, 6.0
    after = [meter.poll() for meter in every]
    for one, other in zip(before, after, strict=True):
        assert 0 < one.value <= other.value
        assert one.low <= other.low
    assert after[0].low <= before[0].low + 30.0 <= after[0].high


def test_a_clock_that_leaps_ahead_counts_idle_time_and_no_work():
    clock = Clock()
    clock.busy = 0.0
    meter = meters.ProcessorMeter(1, lambda: clock.now, lambda: clock.busy)
    clock.now, clock.busy = 3600.0, 1.0
    found = meter.poll()
    assert found.low == pytest.approx(1.0 * (3.5 - 0.74))
    assert found.high > 3600 * 0.74


def test_attempts_before_a_clock_was_set_back_are_read(tmp_path):
    for began in (2000.0, 1000.0):
        kept = ledger.Ledger(tmp_path / "one")
        kept._began, kept._file = began, tmp_path / f"{began}.json"
        with ledger.opened(kept), ledger.measure("train"):
            pass
    assert [e.attempt for e in ledger.read(tmp_path)] == [1, 2]


def test_a_full_disk_is_said_once_and_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    kept = ledger.Ledger(tmp_path / "file" / "folder")

    def phase():
        with kept.measure("train"):
            pass

    with pytest.warns(UserWarning, match="the ledger cannot write"):
        phase()
    phase()
    assert [entry.status for entry in kept.entries] == ["done", "done"]


def test_a_phase_without_tokens_has_no_energy_per_token_and_is_in_the_table():
    with pytest.raises(InputError, match="a window must have tokens"):
        _ = ledger.Window(Interval(1, 1, 1), 5.0, 0).per_token
    entry = Entry("score", joules=Interval(1, 1, 1), seconds=1.0)
    assert ledger.lines([entry], ledger.of_country())[0][0] == "score"


@pytest.mark.parametrize("name", ["grid", "water_site", "water_grid", "pue", "lifetime"])
def test_negative_factors_are_refused_by_name_and_plain_numbers_are_taken(name):
    usual = {"grid": 400.0}
    assert isinstance(getattr(ledger.Factors(**{**usual, name: 2.0}), name), Interval)
    with pytest.raises(InputError, match=f"factor {name} must be"):
        ledger.Factors(**{**usual, name: -2.0})
    with pytest.raises(InputError, match="embodied"):
        ledger.Factors(**usual, embodied={"thread": -1.0})


def test_own_factors_take_the_place_of_the_country_s():
    found = ledger.of_country("DEU", grid=20.0, water_site=0.0)
    assert (found.grid.value, found.water_site.high) == (20.0, 0.0)
    assert found.sources["grid"] == "given by the user"
    assert found.pue == ledger.of_country().pue


def test_an_unknown_part_of_a_machine_widens_the_carbon():
    spent = Entry("train", seconds=factors.YEAR, parts={"abacus": 1})
    found = ledger.footprint(spent, ledger.of_country()).carbon
    assert found.low == 0
    assert found.high == pytest.approx(500 / 4)


def test_an_entry_that_has_ended_is_written_as_it_ended(tmp_path):
    kept = ledger.Ledger(tmp_path, every=0.01)
    with ledger.opened(kept):
        for number in range(3):
            with ledger.measure("prune", cell=str(number)) as entry:
                time.sleep(0.03)
                entry.tokens = number
    assert [(e.cell, e.tokens, e.status) for e in ledger.read(tmp_path)] == [
        ("0", 0, "done"), ("1", 1, "done"), ("2", 2, "done"),
    ]  # fmt: skip


def test_a_benchmark_accounts_for_itself_where_it_fails_too(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks/timed.py"])
    accounts = importlib.import_module("accounts")
    accounted = accounts.accounted
    accounted(lambda: time.sleep(0.1))
    with pytest.raises(ZeroDivisionError):
        accounted(lambda: print(1 / 0))
    # A user's mistake ends in its sentence, and is in the books too.
    with pytest.raises(SystemExit, match=r"^timed: tokens must be an integer of at least 0"):
        accounted(lambda: ledger.measure("train", tokens=-1).__enter__())
    found = ledger.read(tmp_path / "runs/benchmarks/timed")
    assert [(entry.phase, entry.status) for entry in found] == [
        ("timed", "done"),
        ("timed", "failed"),
        ("timed", "failed"),
    ]
    assert found[0].seconds >= 0.1
    assert not capsys.readouterr().err
    monkeypatch.setattr(accounts, "TOLD", 0.0)
    accounted(lambda: None)
    assert "Energy at the meter: " in capsys.readouterr().err


@pytest.mark.parametrize("given", [None, -1, 2.5, True, "many"])
def test_a_work_says_how_many_tokens_it_worked_through(given):
    with pytest.raises(InputError, match="must return how many tokens"):
        ledger.windows({"model": lambda: given}, [meters.ProcessorMeter()], count=1, seconds=0)


def test_tokens_are_not_negative():
    with pytest.raises(InputError, match="tokens must be an integer of at least 0"):
        ledger.measure("train", tokens=-1).__enter__()


@pytest.mark.parametrize("given", ["deu", "Germany", "germany"])
def test_a_country_by_name_is_told_its_code(given):
    with pytest.raises(InputError, match="did you mean 'DEU'"):
        ledger.of_country(given)
