"""Arithmetic on a step that is a plain integer or an array: exact floats of it, or float32."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from swe_prune.errors import InputError

Step = int | Int[Array, "..."]
LAST_STEP = 2**31 - 1  # of an int32


def numbers(step: Any) -> tuple[Any, Any]:
    """Returns the module to compute with, numpy for a plain integer or else jax, and the step."""
    if isinstance(step, int | np.integer) and not isinstance(step, bool):
        return np, int(step)
    if not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise InputError(f"step = {step!r} is no integer; give the number of the optimizer step")
    return jnp, jnp.asarray(step)


def as_float(xp: Any, count: Any) -> Any:
    """Returns a count as a Python float or as float32."""
    return float(count) if xp is np else count.astype(jnp.float32)


def result(xp: Any, value: Any) -> Any:
    """Returns what was computed as Python's own float or bool, or as float32 or bool of jax."""
    if xp is np:
        return value.item() if isinstance(value, np.generic | np.ndarray) else value
    return value if value.dtype == bool else value.astype(jnp.float32)


def ramp(step: Any, initial: float, final: float, begin: int, end: int) -> Any:
    """Returns final + (initial − final) (1 − p)³, where p goes from 0 at `begin` to 1 at `end`."""
    xp, step = numbers(step)
    # What is left of the ramp, from integers: 1 − p would lose digits near its end.
    left = as_float(xp, end - xp.clip(step, begin, end)) / (end - begin)
    return result(xp, final + (initial - final) * left**3)


def due_every(step: Any, begin: int, end: int, every: int) -> Any:
    """Returns whether a step is begin, begin + every, … or end."""
    xp, step = numbers(step)
    inside = (step >= begin) & (step <= end)
    return result(xp, inside & (((step - begin) % every == 0) | (step == end)))


def check_share(name: str, value: Any, *, closed: bool = False) -> None:
    """Raises InputError for what is no number in [0, 1), or in [0, 1] when that is closed."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not (0 <= value < 1 or (closed and value == 1)):
        raise InputError(
            f"{name} = {value!r} is no share in [0, 1{']' if closed else ')'}; give one as a number"
        )


def check_step(name: str, value: Any, *, least: int = 0, why: str = "") -> None:
    """Raises InputError for what is no integer from `least` to the last step of an int32."""
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not number or not least <= value <= LAST_STEP:
        raise InputError(
            f"{name} = {value!r} is no count of steps from {least} to {LAST_STEP}{why}; "
            "give such an integer"
        )
