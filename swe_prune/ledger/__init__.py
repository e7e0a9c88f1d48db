"""What a run costs and what its result saves: seconds, joules, carbon, water, with intervals.

    with ledger.measure("prune", tokens=...) as entry: ...
    entry.seconds, entry.joules, entry.source

interval     numbers with the interval that they lie in
meters       NVML, RAPL, and a model where there is no meter
book         entries of phases and attempts; what a killed run spent is kept
factors      what a joule stands for, each factor with its source
table        ledger.csv, one line a phase
serving      joules per token of models in turns, window by window
second_source  codecarbon's account of the same time, where it is installed
break_even   after how many tokens pruning has paid for itself
"""

from swe_prune.ledger.book import Entry, Ledger, measure, opened, read
from swe_prune.ledger.break_even import BreakEven, break_even
from swe_prune.ledger.factors import WORLD, Factors, Footprint, footprint, of_country, pictured
from swe_prune.ledger.interval import Interval, interval, of_samples, text
from swe_prune.ledger.second_source import Beside, beside, read_beside
from swe_prune.ledger.serving import SECONDS, WINDOWS, Window, idle_watts, per_token, windows
from swe_prune.ledger.table import lines, sources, summary, total, write

__all__ = [
    "SECONDS",
    "WINDOWS",
    "WORLD",
    "Beside",
    "BreakEven",
    "Entry",
    "Factors",
    "Footprint",
    "Interval",
    "Ledger",
    "Window",
    "beside",
    "break_even",
    "footprint",
    "idle_watts",
    "interval",
    "lines",
    "measure",
    "of_country",
    "of_samples",
    "opened",
    "per_token",
    "pictured",
    "read",
    "read_beside",
    "sources",
    "summary",
    "text",
    "total",
    "windows",
    "write",
]
