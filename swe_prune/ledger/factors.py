"""What a joule stands for: overhead of a data centre, carbon and water of a grid, embodied carbon.

Every factor is an interval with its source. The intervals of a grid, of water and of embodied
carbon are wide because the numbers are: they differ by site, by hour and by who accounts.
"""

import csv
import dataclasses
import functools
from collections.abc import Mapping
from importlib import resources

from swe_prune.arguments import checked
from swe_prune.errors import InputError, shown, suggestion
from swe_prune.ledger.book import Entry
from swe_prune.ledger.interval import Interval, interval

JOULES_PER_KWH = 3.6e6
YEAR = 365.25 * 24 * 3600
WORLD = "WORLD"

GRID_SPREAD = 0.25
"""Assumed half-width of a grid's annual mean, as a share: hours, regions and accounting differ."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """A factor and where it is from.

    Attributes:
        amount: Interval of the factor.
        unit: Unit.
        source: Publication, or "assumed" with the reason.
        year: Year that it describes.
    """

    amount: Interval
    unit: str
    source: str
    year: int


PUE = Factor(
    Interval(1.0, 1.56, 2.0),
    "J at the meter of the building per J of the device",
    "Uptime Institute, Global Data Center Survey 2024: mean 1.56; 1 is a desktop, 2 an old hall",
    2024,
)
WATER_SITE = Factor(
    Interval(0.0, 0.55, 1.8),
    "L/kWh of the device",
    "Li et al., arXiv 2304.03271: 0.55 in Microsoft's US halls; 1.8 is the US mean of 2016",
    2023,
)
WATER_GRID = Factor(
    Interval(1.0, 3.1, 9.5),
    "L/kWh at the meter of the building",
    "Li et al., arXiv 2304.03271: US mean 3.1, from dry cooling to regions of hydropower",
    2023,
)
EMBODIED = {
    "accelerator": Factor(
        Interval(150, 318, 500),
        "kg CO2e per device",
        "Chien et al., HotCarbon 2023: 318 kg for an A100 with its share of the server; Luccioni "
        "et al., arXiv 2211.02001: 150 kg for the card",
        2023,
    ),
    "thread": Factor(
        Interval(10, 20, 40),
        "kg CO2e per hardware thread",
        "Luccioni et al., arXiv 2211.02001: 2,500 kg per server, shared among 128 threads; the "
        "interval is assumed",
        2022,
    ),
}
LIFETIME = Factor(
    Interval(4 * YEAR, 6 * YEAR, 8 * YEAR),
    "s in use",
    "Luccioni et al., arXiv 2211.02001: 6 years; the interval is assumed",
    2022,
)


@functools.cache
def grids() -> dict[str, Factor]:
    """Returns the carbon intensity of electricity by country code (ISO 3166, three letters).

    Means of a year over what is generated in a country, with the emissions of the whole life cycle:
    Our World in Data's "Carbon intensity of electricity generation", after Ember and the Energy
    Institute, as codecarbon 3.3 ships it. "WORLD" is the IEA's world mean of 2019.

    >>> grids()["FRA"].amount.value, grids()["WORLD"].amount.value
    (56.0, 475.0)
    """
    source = "Our World in Data, after Ember and the Energy Institute, in codecarbon 3.3.2"
    found = {WORLD: _grid(475.0, "IEA, Global Energy & CO2 Status Report 2019", 2019)}
    table = resources.files("swe_prune.ledger").joinpath("grid.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(table.splitlines()):
        found[row["code"]] = _grid(
            float(row["grams_per_kwh"]), f"{source}: {row['country']}", int(row["year"])
        )
    return found


def _grid(grams: float, source: str, year: int) -> Factor:
    low, high = grams * (1 - GRID_SPREAD), grams * (1 + GRID_SPREAD)
    return Factor(Interval(low, grams, high), "g CO2e/kWh", source, year)


@dataclasses.dataclass(frozen=True)
class Factors:
    """Everything that turns joules and seconds into carbon and water.

    Attributes:
        grid: Carbon intensity of the electricity, g CO2e/kWh.
        pue: Energy at the building's meter per energy of the devices.
        water_site: Water that evaporates on site, L/kWh of the devices.
        water_grid: Water that generating the electricity takes, L/kWh at the building's meter.
        embodied: Carbon of making one part of the machine, kg CO2e, by kind of part; of a part
            that is not in it, anything from 0 to the largest in the table.
        lifetime: Seconds over which that is shared out.
        sources: Where each is from, by name.

    Raises:
        InputError: If a factor is negative, a PUE below 1, or a lifetime not positive.
    """

    grid: Interval
    pue: Interval = PUE.amount
    water_site: Interval = WATER_SITE.amount
    water_grid: Interval = WATER_GRID.amount
    embodied: Mapping[str, Interval] = dataclasses.field(
        default_factory=lambda: {part: factor.amount for part, factor in EMBODIED.items()}
    )
    lifetime: Interval = LIFETIME.amount
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Takes plain numbers as intervals without width, and checks the signs."""
        for name in ("grid", "pue", "water_site", "water_grid", "lifetime"):
            object.__setattr__(self, name, interval(getattr(self, name)))
        for name in ("embodied", "sources"):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(f"{name} must be a mapping, got {shown(getattr(self, name))}")
        embodied = {part: interval(amount) for part, amount in self.embodied.items()}
        object.__setattr__(self, "embodied", embodied)
        amounts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        amounts |= {f"embodied[{part!r}]": amount for part, amount in self.embodied.items()}
        for name, amount in amounts.items():
            if isinstance(amount, Interval) and amount.low < 0:
                raise InputError(f"factor {name} must be 0 or more, got {amount}")
        if self.pue.low < 1:
            raise InputError(
                f"factor pue must be 1 or more, got {self.pue}; it is the building's energy as a "
                "multiple of the devices'"
            )
        if self.lifetime.low <= 0:
            raise InputError(f"factor lifetime must be positive, got {self.lifetime}")


@checked
def of_country(
    country: str = WORLD,
    *,
    pue: float | None = None,
    grid: float | None = None,
    water_site: float | None = None,
    water_grid: float | None = None,
) -> Factors:
    """Returns the factors of a country, or own ones in their place.

    Args:
        country: Three letters of ISO 3166, or "WORLD".
        pue: Own PUE. None: the survey's mean with its interval.
        grid: Own carbon intensity of the electricity, g CO2e/kWh. None: the country's.
        water_site: Own water on site, L/kWh of the devices. None: the published one.
        water_grid: Own water of the electricity, L/kWh. None: the published one.

    Raises:
        InputError: If the country is unknown, a factor negative, or the PUE below 1.

    >>> of_country("DEU").grid.value
    381.0
    """
    known = grids()
    if country not in known:
        names = {known[code].source.rpartition(": ")[2].lower(): code for code in known}
        near = names.get(country.lower(), country.upper())
        raise InputError(
            f"country {shown(country)} is not in the table{suggestion(near, known)}; give three "
            f"letters of ISO 3166, {WORLD!r}, or your own `Factors`"
        )
    own = {"pue": pue, "grid": grid, "water_site": water_site, "water_grid": water_grid}
    used = {
        "grid": known[country],
        "pue": PUE,
        "water_site": WATER_SITE,
        "water_grid": WATER_GRID,
        **{f"embodied, {part}": factor for part, factor in EMBODIED.items()},
        "lifetime": LIFETIME,
    }
    sources = {name: f"{factor.source} ({factor.year})" for name, factor in used.items()}
    given = {name: interval(value) for name, value in own.items() if value is not None}
    sources |= dict.fromkeys(given, "given by the user")
    return Factors(**{"grid": known[country].amount, "sources": sources, **given})


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What some energy and time cost.

    Attributes:
        kwh: Energy at the building's meter, kWh.
        carbon: Emissions, kg CO2e, those of making the machine included.
        water: Water, L.
    """

    kwh: Interval
    carbon: Interval
    water: Interval


@checked
def footprint(entry: Entry, factors: Factors) -> Footprint:
    """Returns the footprint of what was spent.

    kWh = J * PUE / 3.6e6; carbon = kWh * grid + embodied * seconds / lifetime; water = J / 3.6e6 *
    on site + kWh * grid (Li et al., arXiv 2304.03271).

    Args:
        entry: What was spent: joules, and the seconds that the parts of the machine were taken.
        factors: Factors, for example `of_country("FRA")`.

    >>> one = Interval(1, 1, 1)
    >>> paid = footprint(Entry("train", joules=one * 3.6e6), Factors(one * 100, pue=one * 2))
    >>> round(paid.kwh.value, 6), round(paid.carbon.value, 6)
    (2.0, 0.2)
    """
    device = entry.joules * (1 / JOULES_PER_KWH)
    kwh = device * factors.pue
    made = [
        factors.embodied.get(part, _unknown()) * count * entry.seconds / factors.lifetime
        for part, count in entry.parts.items()
    ]
    water = device * factors.water_site + kwh * factors.water_grid
    return Footprint(kwh, sum(made, kwh * factors.grid * 1e-3), water)


def _unknown() -> Interval:
    high = max(factor.amount.high for factor in EMBODIED.values())
    return Interval(0.0, high / 2, high)


@checked
def pictured(kwh: Interval) -> str:
    """Returns an amount of energy as something a person can picture.

    A litre of water takes 0.0930 kWh from 20 to 100 degrees (4.186 kJ per kg and degree, 80
    degrees); a cup is a quarter of one.

    >>> pictured(Interval(0.08, 0.093, 0.1))
    'as much as boiling 4 cups of water'
    """
    cups = kwh.value / (4186 * 80 / JOULES_PER_KWH) * 4
    if cups < 1:
        seconds = kwh.value * JOULES_PER_KWH / 10
        time = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
        return f"as much as a lamp of 10 W in {time}"
    if cups < 200:
        return f"as much as boiling {cups:.0f} cups of water"
    return f"as much as boiling {cups / 4:,.0f} litres of water"
