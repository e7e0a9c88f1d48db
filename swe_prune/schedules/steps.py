"""Arithmetic on steps: exact Python floats for integers, float32 for arrays."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from swe_prune.errors import InputError, shown

Step = int | Int[Array, "..."]
LAST_STEP = 2**31 - 1  # the largest int32


def numbers(step: Any) -> tuple[Any, Any]:
    """Returns numpy for a Python or numpy integer, else jax.numpy, together with the step."""
    if isinstance(step, int | np.integer) and not isinstance(step, bool):
        return np, int(step)
    if not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise InputError(f"step must be the integer number of an optimizer step, got {shown(step)}")
    return jnp, jnp.asarray(step)


def as_float(xp: Any, count: Any) -> Any:
    """Converts a count to a Python float or to float32."""
    return float(count) if xp is np else count.astype(jnp.float32)


def result(xp: Any, value: Any) -> Any:
    """Converts a result to a Python float or bool, or to a float32 or bool JAX array."""
    if xp is np:
        return value.item() if isinstance(value, np.generic | np.ndarray) else value
    return value if value.dtype == bool else value.astype(jnp.float32)


def ramp(step: Any, initial: float, final: float, begin: int, end: int) -> Any:
    """Returns final + (initial − final) (1 − p)³, where p goes from 0 at `begin` to 1 at `end`."""
    xp, step = numbers(step)
    # 1 − p from integers, because 1 − p in floats loses digits near the end of the ramp.
    left = as_float(xp, end - xp.clip(step, begin, end)) / (end - begin)
    return result(xp, final + (initial - final) * left**3)


def due_every(step: Any, begin: int, end: int, every: int) -> Any:
    """Returns whether a step is one of begin, begin + every, …, end."""
    xp, step = numbers(step)
    inside = (step >= begin) & (step <= end)
    return result(xp, inside & (((step - begin) % every == 0) | (step == end)))


def check_share(name: str, value: Any, *, closed: bool = False) -> None:
    """Raises InputError if a value is not a number in [0, 1), or in [0, 1] if `closed`."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not (0 <= value < 1 or (closed and value == 1)):
        raise InputError(
            f"{name} must be a number in [0, 1{']' if closed else ')'}, got {shown(value)}"
        )


def check_step(name: str, value: Any, *, least: int = 0, why: str = "") -> None:
    """Raises InputError if a value is not an integer from `least` to the largest int32."""
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not number or not least <= value <= LAST_STEP:
        raise InputError(
            f"{name} must be an integer number of steps from {least} to {LAST_STEP}{why}, "
            f"got {shown(value)}"
        )
