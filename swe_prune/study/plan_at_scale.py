"""What a train step would take on a mesh that is not there: compiled, not run.

The real step is compiled for as many forced host devices, from abstract arrays, so nothing of the
model's size is ever allocated. The division over the devices, and with it what each holds and what
they send each other, is the partitioner's and the same on every backend; XLA for a TPU or GPU may
still merge collectives and schedule temporaries otherwise, so those are estimates.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import PyTree
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from swe_prune import parallel
from swe_prune.errors import RunError, visible
from swe_prune.study.experiment import Experiment
from swe_prune.training.progress import print_line

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_OPERATION = re.compile(
    rf"= (?P<shape>.*?) (?P<kind>{'|'.join(COLLECTIVES)})(?:-start)?\((?P<rest>.*)"
)
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)|branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'known_trip_count\\?"?:\{\\?"n\\?":\\?"(\d+)')


@dataclasses.dataclass(frozen=True)
class Cost:
    """Memory and traffic of one compiled train step, per device, in bytes.

    Attributes:
        parameters: Bytes of the weights, float32.
        optimizer: Bytes of the optimizer's state.
        statistics: Bytes of the trajectory statistics, wherever they live.
        statistics_on_host: Whether the statistics live in the host's memory.
        masks: Bytes of a pruned model's masks, one a prunable weight; a dense one has none.
        temporary: Bytes of activations, gradients and gathered weights at their peak.
        received: Bytes that a device receives in a step, by kind of collective.
    """

    parameters: int
    optimizer: int
    statistics: int
    statistics_on_host: bool
    masks: int
    temporary: int
    received: dict[str, int]

    @property
    def device(self) -> int:
        """What must fit a device's memory while a pruned model trains on, still tracked."""
        held = self.parameters + self.optimizer + self.masks + self.temporary
        return held + (0 if self.statistics_on_host else self.statistics)


def cost(experiment: Experiment) -> Cost:
    """Returns what the dense phase's step takes on the experiment's mesh."""
    state = jax.eval_shape(lambda p: experiment.dense_state(p, 0), experiment.abstract_params)
    state = experiment.place(state)
    masks = experiment.abstract_prunable(jnp.bool_)
    statistics = state.stats
    if experiment.host_statistics:
        state = dataclasses.replace(state, stats=None)
    rows, sharding = experiment.config.data.batch, NamedSharding(experiment.mesh, parallel.BATCH)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding),
        experiment.validation[0],
    )
    compiled = experiment.train_step.lower(state, batch).compile()
    return Cost(
        parameters=per_device(state.params),
        optimizer=per_device(state.opt_state),
        statistics=per_device(statistics),
        statistics_on_host=experiment.host_statistics,
        masks=per_device(masks),
        temporary=int(compiled.memory_analysis().temp_size_in_bytes),
        received=received(compiled.as_text(), experiment.mesh.size),
    )


def per_device(values: PyTree) -> int:
    """Returns the bytes of abstract arrays with shardings that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(values)
    )


def received(text: str, devices: int) -> dict[str, int]:
    """Returns the bytes that a device receives in a compiled program, by kind of collective.

    Of g devices in a group each receives (g − 1)/g of what it ends with from an all-gather or an
    all-to-all, g − 1 times it from a reduce-scatter, 2 (g − 1)/g times it from an all-reduce (as a
    ring does it), all of it from a collective-permute. A loop's body counts as often as it runs.

    Args:
        text: Text of the compiled program.
        devices: Number of devices that the program is compiled for.

    Raises:
        RunError: A form of the text that is not known.
    """
    bodies, entry = _computations(text)
    totals: collections.Counter[str] = collections.Counter()

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            found = _OPERATION.search(line)
            if found:
                totals[found["kind"]] += times * _bytes_received(found, devices)
            trips = _TRIPS.search(line)
            for one, several in _CALLED.findall(line):
                for called in [one] if one else re.findall(r"[\w.-]+", several):
                    walk(called, times * (int(trips[1]) if trips else 1))

    walk(entry, 1)
    return dict(totals)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        opened = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if opened and not line.startswith(" "):
            name = opened[2]
            bodies[name] = []
            entry = name if opened[1] else entry
        elif line.startswith(" ") and name:
            bodies[name].append(line)
    return bodies, entry


def _bytes_received(found: re.Match[str], devices: int) -> int:
    result = sum(
        math.prod(map(int, filter(None, dims.split(",")))) * _itemsize(dtype)
        for dtype, dims in _SHAPE.findall(found["shape"])
    )
    group = _group_size(found["rest"], devices)
    share = {
        "all-gather": (group - 1) / group,
        "all-to-all": (group - 1) / group,
        "reduce-scatter": group - 1,
        "all-reduce": 2 * (group - 1) / group,
        "collective-permute": 1,
    }[found["kind"]]
    return round(result * share)


def _itemsize(dtype: str) -> int:
    if dtype == "pred":
        return 1
    digits = re.search(r"\d+", dtype)
    return max(1, int(digits[0]) // 8) if digits else 4


def _group_size(rest: str, devices: int) -> int:
    """Returns how many devices take part together, from any of the forms in which XLA writes it."""
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}", rest):
        lengths = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or lengths[axis]) for axis, part in used)
    if "source_target_pairs" in rest or "replica_groups={}" in rest:
        return devices
    raise RunError(
        "the groups of a collective cannot be read in the compiled program of this JAX "
        f"({rest[:80]!r}); report it with the version, {jax.__version__}"
    )


def table(experiment: Experiment, found: Cost) -> Table:
    """Returns a table of what one device holds and receives."""
    axes = ", ".join(f"{axis} {n}" for axis, n in experiment.mesh.shape.items())
    title = f"{visible(experiment.config.name)} on {axes}: per device"
    shown = Table(title=escape(title), title_justify="left")
    shown.add_column("what")
    shown.add_column("bytes", justify="right")
    where = "host memory" if found.statistics_on_host else "device memory"
    for name, size in (
        ("parameters", found.parameters),
        ("optimizer", found.optimizer),
        (f"trajectory statistics, in {where}", found.statistics),
        ("masks, once pruned", found.masks),
        ("temporary: activations, gradients, gathered weights", found.temporary),
        ("device memory in all", found.device),
        *((f"received in a step by {kind}", size) for kind, size in found.received.items()),
    ):
        shown.add_row(name, f"{size:,}")
    return shown


def plan_at_scale(experiment: Experiment, console: Console) -> None:
    """Compiles the train step and prints what one device holds and receives."""
    for sentence in experiment.undivided:
        print_line(console, sentence)
    console.print(table(experiment, cost(experiment)))


def as_json(found: Cost) -> Mapping[str, Any]:
    """Returns a cost as JSON can hold it."""
    return dataclasses.asdict(found) | {"device": found.device}
