"""ssProp on a small CNN: scikit-learn's digits, by epoch; `python benchmarks/related.py digits`.

Three convolutions and a head from random weights. The training split of the scans is that of the
price tags (`data.digit_prices.tags.split_scans`), and the two others are the test set: no scan is
in both. The published setting keeps a fifth of the channels in every other epoch (2408.12561). Time
and energy are those of a training step, in turns with the dense step, and so are its operations, as
XLA counts them.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fitting import cost, operations, quartiles, shown
from flax import linen as nn
from rich.table import Table

from swe_prune.data.digit_prices import tags
from swe_prune.related import ssprop

BATCH = 64
EPOCHS = 30
SCHEDULES = {
    "all": ssprop.Schedule(1.0),
    "20 % in every other epoch": ssprop.Schedule(0.2, length=EPOCHS, interleaved=True),
    "60 %": ssprop.Schedule(0.6),
    "20 %": ssprop.Schedule(0.2),
}

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class CNN(nn.Module):
    """Three convolutions of 3 x 3, the second and third with half the height and width."""

    @nn.compact
    def __call__(self, x_BxYxX: Any) -> Any:  # noqa: D102 (the class's)
        x_BxYxXxC = x_BxYxX[..., None]
        for number, (features, stride) in enumerate(((32, 1), (64, 2), (128, 2))):
            layer = nn.Conv(features, (3, 3), strides=(stride, stride), name=f"conv_{number}")
            x_BxYxXxC = nn.relu(layer(x_BxYxXxC))
        return nn.Dense(10, name="head")(x_BxYxXxC.mean((1, 2)))


def scans() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the images, 0 to 1, and digits of "train" and "test"."""
    ink, digits = tags.scans()
    own = tags.split_scans(digits)
    parts = {"train": own["train"], "test": np.concatenate([own["validation"], own["test"]])}
    return {
        name: (ink[part].astype(np.float32) / 255, digits[part].astype(np.int32))
        for name, part in parts.items()
    }


def epoch(train: tuple[np.ndarray, np.ndarray], seed: int, number: int) -> Iterator[Any]:
    """Yields the batches of an epoch in its own order, without the last incomplete one."""
    order = np.random.default_rng((seed, number)).permutation(len(train[1]))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        part = order[start : start + BATCH]
        yield train[0][part], train[1][part]


def step_of(model: Any, optimizer: optax.GradientTransformation, keep: float) -> Step:
    """Returns the compiled train step that gradients pass through so many channels of."""

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        images, digits = batch

        def loss(params: Any) -> Any:
            with nn.intercept_methods(ssprop.interceptor(keep)):
                logits = model.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, digits).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(seeds: list[int], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Returns, by schedule, the test errors, and time and energy of a step beside a dense one."""
    model: Any = CNN()
    data, optimizer = scans(), optax.adamw(1e-3, weight_decay=0.01)
    steps = {keep: step_of(model, optimizer, keep) for keep in (1.0, 0.6, 0.2)}
    predict = jax.jit(lambda params, x: jnp.argmax(model.apply({"params": params}, x), -1))

    def fresh(seed: int) -> tuple[Any, Any]:
        params = model.init(jax.random.key(seed), jnp.zeros((1, 8, 8)))["params"]
        return params, optimizer.init(params)

    def once(params: Any, state: Any, share: float) -> None:
        jax.block_until_ready(steps[share](params, state, batch))

    batch, rows = next(epoch(data["train"], 0, 0)), []
    for name, schedule in SCHEDULES.items():
        errors = []
        for seed in seeds:
            params, state = fresh(seed)
            for number in range(EPOCHS):
                for some in epoch(data["train"], seed, number):
                    params, state = steps[schedule(number)](params, state, some)
            images, digits = data["test"]
            errors.append(float((predict(params, images) != digits).mean()))
            say(f"{name}, seed {seed}: {errors[-1]:.2%} of {len(digits)} scans wrong")
        first = (*fresh(0), batch)
        counted = [operations(steps[share], *first) for share in (schedule(1), 1.0)]
        measured = cost(functools.partial(once, *fresh(0)), schedule(1), BATCH)
        rows.append(
            {"schedule": name, "errors": errors, "operations": counted[0] / counted[1], **measured}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns the rows as a table."""
    made = Table("channels kept", "test error, %", "operations", "step time")
    made.add_column(f"energy ({rows[0]['source']})")
    for row in rows:
        ratios = [quartiles(row[name]) for name in ("time", "energy")]
        errors = shown([100 * one for one in row["errors"]], 2)
        made.add_row(row["schedule"], errors, f"{row['operations']:.3f}", *ratios)
    return made
