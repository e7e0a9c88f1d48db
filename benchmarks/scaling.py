"""A train step and a global selection on 1, 2, 4 and 8 devices: tokens/s, seconds, bytes received.

    python benchmarks/scaling.py [--devices=1,2,4,8] [--axis=fsdp] [--rounds=9]
    JAX_PLATFORMS=cuda python benchmarks/scaling.py --devices=1,2
    python benchmarks/scaling.py --activations [--devices=8]

Weak scaling: every device has its own 8 windows, whatever their number. Each number of devices is a
process of its own, since JAX fixes it at the start; they take turns, so a busy machine slows all,
and a ratio is that of two turns of one round. On CPU the devices are forced and share the machine's
cores: more of them than cores cannot be faster, and what their tokens/s falls short of one device's
is what the division costs. On GPUs each process sees the first so many.

With `--activations` nothing is timed: a small model's step is compiled with and without
`parallel.constrain_rows`, at two batches, and what it receives is printed.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from accounts import accounted

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "shakespeare_char.py"
WINDOWS = 8  # of each device
SPARSITY = 0.6
STEPS = 5  # in a turn


def work(devices: int, axis: str) -> None:
    """Says what a step takes, then measures a turn for every line on standard input."""
    import jax

    from swe_prune import config, importance, masks
    from swe_prune.study import plan_at_scale
    from swe_prune.study.experiment import setup

    overrides = {"parallel.data": 1} | {f"parallel.{axis}": devices}
    for key in ("batch", "eval_windows", "eval_batch"):
        overrides[f"data.{key}"] = WINDOWS * devices
    settings = config.load(CONFIG, [f"{key}={value}" for key, value in overrides.items()])
    experiment = setup(settings, Path())
    cost = plan_at_scale.cost(experiment)
    batches = experiment.batches(0)
    state = experiment.fresh_state(0)
    prunable = experiment.prunable

    @jax.jit
    def score(params: Any) -> Any:
        return importance.score("magnitude", params, prunable=prunable)

    def select(scores: Any) -> Any:
        return masks.by_sparsity(scores, SPARSITY, scope="global")

    select_in_jit = jax.jit(select)

    def turn(state: Any) -> tuple[Any, dict[str, float]]:
        given = [next(batches) for _ in range(STEPS)]
        began = time.perf_counter()
        for batch in given:
            state, _ = experiment.train_step(state, batch)
        jax.block_until_ready(state)
        stepped = time.perf_counter()
        spent = {"step": (stepped - began) / STEPS}
        scores = jax.block_until_ready(score(state.params))
        for name, run in (("selection", select), ("in a jit", select_in_jit)):
            began = time.perf_counter()
            jax.block_until_ready(run(scores))
            spent[name] = time.perf_counter() - began
        return state, spent

    state, _ = turn(state)  # compiles
    print(json.dumps(about(jax) | {"received": cost.received}), flush=True)
    for _ in sys.stdin:
        state, spent = turn(state)
        print(json.dumps(spent), flush=True)


def activations(devices: int, axis: str) -> None:
    """Prints what a step of a small model receives with and without `constrain_rows`."""
    from swe_prune import config, parallel
    from swe_prune.study import plan_at_scale
    from swe_prune.study.experiment import setup

    small = {"layers": 2, "heads": 2, "width": 16, "context": 16}
    print("| batch | constrain_rows | received in a step, bytes |\n|---:|---|---:|")
    kept = parallel.constrain_rows
    for windows in (devices, 2 * devices):
        for constrained in (False, True):
            # As `setup` builds the model, with the one call that is measured left out.
            parallel.constrain_rows = kept if constrained else lambda x, mesh: x
            overrides = {f"model.{key}": value for key, value in small.items()}
            overrides |= {"parallel.data": 1, f"parallel.{axis}": devices}
            overrides |= {f"data.{k}": windows for k in ("batch", "eval_windows", "eval_batch")}
            given = [f"{key}={value}" for key, value in overrides.items()]
            received = plan_at_scale.cost(setup(config.load(CONFIG, given), Path())).received
            says = "with" if constrained else "without"
            print(f"| {windows} | {says} | {sum(received.values()):,} |", flush=True)


def environment(devices: int) -> dict[str, str]:
    """Returns that of a process that sees so many devices."""
    env = dict(os.environ)
    if env.get("JAX_PLATFORMS", "cpu") != "cpu":
        return env | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices)))}
    forced = f"--xla_force_host_platform_device_count={devices}"
    return env | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{env.get('XLA_FLAGS', '')} {forced}"}


def about(jax: Any) -> dict[str, Any]:
    """Returns what the numbers were measured with."""
    return {"kind": jax.devices()[0].device_kind, "jax": jax.__version__}


class Worker:
    """A process with some devices, which waits to be told to take its turn."""

    def __init__(self, devices: int, axis: str) -> None:
        """Starts it, compiles there and waits until that is done."""
        self.devices = devices
        self.turns: list[dict[str, float]] = []
        self._process = subprocess.Popen(
            [sys.executable, __file__, f"--worker={devices}", f"--axis={axis}"],
            env=environment(devices),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.cost = self._line()

    def take(self) -> None:
        """Measures one turn."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        self.turns.append(self._line())

    def end(self) -> None:
        """Lets the process end."""
        self._process.communicate()

    def _line(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"the process with {self.devices} devices ended with {self._process.wait()}")

    def tokens_per_second(self, context: int) -> list[float]:
        """Returns those of every turn."""
        return [WINDOWS * self.devices * context / turn["step"] for turn in self.turns]


def spread(values: list[float], form: str) -> str:
    """Returns the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    """Starts a process for each number of devices, lets them take turns, prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", default="1,2,4,8")
    parser.add_argument("--axis", choices=("data", "fsdp", "tensor"), default="fsdp")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--activations", action="store_true", help="what a small step receives")
    options = parser.parse_args()
    if options.worker is not None:
        task = activations if options.activations else work
        accounted(lambda: task(options.worker, options.axis))
        return
    if options.activations:
        for devices in options.devices.split(","):
            command = [sys.executable, __file__, f"--worker={devices}", f"--axis={options.axis}"]
            subprocess.run([*command, "--activations"], env=environment(int(devices)), check=True)
        return

    from swe_prune import config

    context = config.load(CONFIG, []).model.context
    workers = [Worker(int(n), options.axis) for n in options.devices.split(",")]
    for number in range(options.rounds):
        for worker in workers if number % 2 == 0 else reversed(workers):
            worker.take()
    told = workers[0].cost
    print(
        f"{CONFIG.name}, {WINDOWS} windows of {context} tokens on each device, axis "
        f"{options.axis}, selection of {SPARSITY} by magnitude, global; jax {told['jax']}, Python "
        f"{platform.python_version()}, {told['kind']}, {os.cpu_count()} cores; medians (quartiles) "
        f"of {options.rounds} rounds, ratios to the first line in the same round\n"
    )
    heads = (
        "devices", "tokens/s", "ratio", "selection, ms", "ratio", "in a jit, ms", "ratio",
        "received in a step, kB",
    )  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|" + "---:|" * len(heads))
    base = workers[0]
    for worker in workers:
        tokens, first = (one.tokens_per_second(context) for one in (worker, base))
        selections = []
        for name in ("selection", "in a jit"):
            chosen, chosen_first = ([t[name] for t in one.turns] for one in (worker, base))
            selections += [
                spread([1e3 * seconds for seconds in chosen], ".1f"),
                spread([a / b for a, b in zip(chosen, chosen_first, strict=True)], ".2f"),
            ]
        received = ", ".join(
            f"{kind} {size / 1e3:,.0f}" for kind, size in worker.cost["received"].items()
        )
        cells = (
            str(worker.devices),
            spread(tokens, ",.0f"),
            spread([a / b for a, b in zip(tokens, first, strict=True)], ".2f"),
            *selections,
            received or "nothing",
        )
        print("| " + " | ".join(cells) + " |")
    for worker in workers:
        worker.end()


if __name__ == "__main__":
    main()
