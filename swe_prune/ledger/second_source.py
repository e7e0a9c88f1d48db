"""codecarbon's own account of the same time, next to ours, where the package is installed.

Its offline tracker reads RAPL and NVML or takes a share of the processor's rated power, adds the
memory, and multiplies by the country's mean. It has no intervals, no embodied carbon, and no water
(https://github.com/mlco2/codecarbon, 3.3).
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from swe_prune.arguments import checked
from swe_prune.errors import InputError
from swe_prune.ledger.book import EVERY, Ledger
from swe_prune.ledger.factors import WORLD, Factors, footprint
from swe_prune.ledger.interval import Interval
from swe_prune.ledger.table import total
from swe_prune.runtime import storage


@checked
@dataclasses.dataclass(frozen=True)
class Beside:
    """What codecarbon and we say of one attempt.

    Attributes:
        version: Version of codecarbon.
        seconds: Time that it watched.
        kwh: Its energy, times the PUE.
        carbon: Its emissions, kg CO2e.
        our_kwh: Our energy of the same attempt, at the building's meter.
        our_carbon: Our emissions, those of making the machine included.
    """

    version: str
    seconds: float
    kwh: float
    carbon: float
    our_kwh: Interval
    our_carbon: Interval


@contextlib.contextmanager
def beside(
    folder: epath.PathLike,
    book: Ledger,
    factors: Factors,
    country: str = WORLD,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[None]:
    """Measures the body of the `with` by codecarbon, if it is installed; writes one file.

    Errors of codecarbon are reported and do not stop the body.

    Args:
        folder: Folder for the attempt's file, local or in a bucket.
        book: Ledger of the same attempt.
        factors: Our factors, of which it gets the PUE, and without a country the intensity.
        country: Three letters of ISO 3166, or "WORLD".
        say: Callback for what went wrong.
    """
    if importlib.util.find_spec("codecarbon") is None:
        yield
        return
    began, tracker = time.time(), _started(factors, country, say)
    try:
        yield
    finally:
        if tracker is not None:
            found = _stopped(tracker, book, factors, say)
            if found is not None:
                path = storage.parse_path(folder, "codecarbon") / f"{began:.6f}.json"
                storage.write(path, json.dumps(storage.sealed(dataclasses.asdict(found))))


def _started(factors: Factors, country: str, say: Callable[[str], None]) -> Any | None:
    place = {"country_iso_code": country}
    if country == WORLD:  # which it has not
        place = {"force_carbon_intensity_g_co2e_kwh": factors.grid.value}
    try:
        tracker = importlib.import_module("codecarbon").OfflineEmissionsTracker(
            **place,
            pue=factors.pue.value,
            tracking_mode="process",
            measure_power_secs=EVERY,
            save_to_file=False,
            allow_multiple_runs=True,
            log_level="critical",
        )
        tracker.start()
    except Exception as error:  # anything in a stranger's package; the run goes on
        say(f"codecarbon does not start ({error}); its account is left out")
        return None
    return tracker


def _stopped(
    tracker: Any, book: Ledger, factors: Factors, say: Callable[[str], None]
) -> Beside | None:
    try:
        tracker.stop()
        found = tracker.final_emissions_data
        seconds, kwh, carbon = found.duration, found.energy_consumed, found.emissions
    except Exception as error:  # as above
        say(f"codecarbon does not end ({error}); its account is left out")
        return None
    ours = footprint(total(book.entries), factors)
    version = importlib.metadata.version("codecarbon")
    return Beside(version, seconds, kwh, carbon, ours.kwh, ours.carbon)


def read_beside(folder: epath.PathLike) -> list[Beside]:
    """Returns the accounts of all attempts, none without codecarbon.

    Raises:
        InputError: If a file is damaged.
    """
    folder = epath.Path(folder)
    return [_parsed(path) for path in sorted(folder.glob("*.json"))] if folder.exists() else []


def _parsed(path: epath.Path) -> Beside:
    try:
        content = storage.read_json(path)
        for name in ("our_kwh", "our_carbon"):
            content[name] = Interval(**content[name])
        return Beside(**content)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it") from error


def line(found: list[Beside]) -> tuple[str, ...]:
    """Returns (name, seconds, energy, carbon, water) as text, each with its part of ours.

    >>> one = Interval(0.5, 1.0, 2.0)
    >>> line([Beside("3.3.2", 10.0, 0.8, 0.5, one, one)])
    ('codecarbon 3.3.2', '10.0', '800 Wh (0.80 of ours)', '500 g CO2e (0.50 of ours)', '-')
    """

    def part(amount: float, ours: float, unit: str) -> str:
        share = f" ({amount / ours:.2f} of ours)" if ours else ""
        return f"{amount * 1e3:.3g} {unit}{share}"

    return (
        "codecarbon " + "+".join(dict.fromkeys(one.version for one in found)),
        f"{sum(one.seconds for one in found):,.1f}",
        part(sum(one.kwh for one in found), sum(one.our_kwh.value for one in found), "Wh"),
        part(
            sum(one.carbon for one in found), sum(one.our_carbon.value for one in found), "g CO2e"
        ),
        "-",
    )
