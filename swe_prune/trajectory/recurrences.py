"""The recurrences of one tensor: its buffers after a snapshot, and those of two parts of a run."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

CARRIED = ("late_mean", "late_mean_abs", "mean", "sum_of_squares", "mean_abs", "path_length")
"""Buffers whose rounding errors may be tracked."""
CARRY = "_carry"
"""Suffix of the buffer that stores another buffer's rounding error."""


def advance(
    old: dict[str, Array],
    weight: Array,
    late_share: Array,
    share: Array,
    vote_rate: float,
    copies: tuple[int, ...],
) -> dict[str, Array]:
    """Returns the buffers of one tensor after a snapshot; computes only those that exist."""
    size = jnp.abs(weight)
    new = dict(old)

    # Difference from a mean, including the rounding error of the mean.
    def beyond(buffers: dict[str, Array], name: str, value: Array) -> Array:
        return (value - buffers[name]) - buffers.get(name + CARRY, 0.0)

    # Add to a buffer, and update its rounding error if it has one.
    def add(name: str, increment: Array) -> None:
        carry = old.get(name + CARRY)
        if carry is None:
            new[name] = old[name] + increment
        else:
            new[name], error = _two_sum(old[name], increment + carry.astype(jnp.float32))
            new[name + CARRY] = error.astype(carry.dtype)

    # Running means first: the sum of squares needs the mean before and after this snapshot.
    for name, value, step in (
        ("late_mean", weight, late_share),
        ("late_mean_abs", size, late_share),
        ("mean", weight, share),
        ("mean_abs", size, share),
    ):
        if name in old:
            add(name, step * beyond(old, name, value))
    if "sum_of_squares" in old:
        add("sum_of_squares", beyond(old, "mean", weight) * beyond(new, "mean", weight))
    # These compare with the previous snapshot, so `last` is updated at the end.
    if "path_length" in old:
        add("path_length", jnp.abs(weight - old["last"]))
    # The threshold depends on the whole tensor; this is the only reduction.
    if "votes" in old:
        along = tuple(axis for axis in range(size.ndim) if axis not in copies)
        number = math.prod(size.shape[axis] for axis in along)
        spread = jnp.std(size, axis=along, ddof=min(1, number - 1), keepdims=bool(copies))
        new["votes"] += size > spread * vote_rate
    if "sign_flips" in old:
        new["sign_flips"] += jnp.sign(weight) * jnp.sign(old["last"]) < 0
    if "last" in old:
        new["last"] = weight
    return new


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns the rounded sum and its rounding error, regardless of which operand is larger."""
    total = a + b
    b_seen = total - a
    return total, (a - (total - b_seen)) + (b - b_seen)


def add_compensated(total: Float[Array, "2"], value: Float[Array, ""]) -> Float[Array, "2"]:
    """Returns the Kahan-compensated sum, for sums of t^p over long runs."""
    corrected = value - total[1]
    new = total[0] + corrected
    return jnp.stack([new, (new - total[0]) - corrected])


def joined(
    x: dict[str, Array],
    y: dict[str, Array],
    late_share: Array,
    share: Array,
    between: Array,
    y_has_any: Array,
) -> dict[str, Array]:
    """Returns the buffers of one tensor over the snapshots of x followed by those of y."""

    def carry_of(part: dict[str, Array], name: str) -> Array:
        return part.get(name + CARRY, jnp.zeros_like(part[name])).astype(jnp.float32)

    new = {}
    for name in x:
        if name == "first":
            new[name] = x[name]
        elif name == "last":
            new[name] = jnp.where(y_has_any, y[name], x[name])
        elif name in ("votes", "sign_flips"):
            new[name] = x[name] + y[name]
        elif name in CARRIED:
            # A sum adds y; a mean moves towards y by its share. Their carries do the same.
            x_carry, y_carry = carry_of(x, name), carry_of(y, name)
            if name in ("path_length", "sum_of_squares"):
                increment, carry = y[name], x_carry + y_carry
            else:
                step = late_share if name.startswith("late") else share
                increment = step * (y[name] - x[name])
                carry = x_carry + step * (y_carry - x_carry)
            if name == "sum_of_squares":
                # Squared deviations between the two means (Chan, Golub and LeVeque).
                apart = (y["mean"] - x["mean"]) + (carry_of(y, "mean") - carry_of(x, "mean"))
                carry = carry + between * apart**2
            partial, error = _two_sum(x[name], increment)
            new[name], rest = _two_sum(partial, carry + error)
            if name + CARRY in x:
                new[name + CARRY] = rest.astype(jnp.bfloat16)
    return {name: new[name] for name in x}
