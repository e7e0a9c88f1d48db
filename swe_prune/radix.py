"""Selection over the shards of arrays: a few collectives, however many arrays there are.

`select` counts candidates two bits at a time, and over several devices each count of each array is
a collective. Here each device counts the digits of its own keys in a histogram, of all arrays
together, and one collective adds them up: three for the 32 bits of float32, and where ties are cut
one for the ties of each array and two for their places. The masks are the same.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, UInt

from swe_prune import counting

DIGIT = 11
"""Bits of a key that a pass resolves: a histogram of 2,048 bins."""

PLACE_DIGIT = 16
"""Bits of a place that a pass resolves where one selection runs over all arrays."""


class Shards(NamedTuple):
    """How arrays lie on the devices of one mesh.

    Attributes:
        mesh: Mesh of more than one device.
        specs: Partition spec of each array.
        shapes: Shape of each array.
    """

    mesh: Mesh
    specs: tuple[P, ...]
    shapes: tuple[tuple[int, ...], ...]


def sortable_bits(x: Float[Array, "..."]) -> UInt[Array, "..."]:
    """Returns unsigned integers with the order of the floats, with −0 = +0 and NaN below −inf.

    Args:
        x: Floats of any width; the result has the same width (16 bits for bfloat16).
    """
    width = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{width}")
    sign = jnp.asarray(1 << (width - 1), unsigned)
    infinity = jax.lax.bitcast_convert_type(jnp.asarray(jnp.inf, x.dtype), unsigned)
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    # Compare bits, not floats: a backend that flushes denormals would treat them as zero.
    bits = jnp.where(bits == sign, jnp.zeros_like(bits), bits)
    ordered = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where((bits & ~sign) > infinity, jnp.zeros_like(bits), ordered)


def shards_of(xs: Sequence[Any]) -> Shards | None:
    """Returns how concrete arrays lie on one mesh, or None where nothing is gained by knowing it.

    That is on one device, on several meshes, and on TPUs, which scatter into a histogram one
    element after another and whose collectives cost little.
    """
    placed: list[Any] = [getattr(x, "sharding", None) for x in xs]
    if not placed or jax.default_backend() == "tpu":
        return None
    mesh = getattr(placed[0], "mesh", None)
    if not isinstance(mesh, Mesh) or mesh.size == 1:
        return None
    if not all(isinstance(one, NamedSharding) and one.mesh == mesh for one in placed):
        return None
    if any(jnp.finfo(x.dtype).bits > 32 for x in xs):
        return None
    return Shards(mesh, tuple(one.spec for one in placed), tuple(x.shape for x in xs))


@functools.lru_cache(maxsize=256)
def compiled(shards: Shards, groups: tuple[int, ...], ties: str) -> Any:
    """Returns the jitted selection of (arrays, counts): masks, and NaN of each array.

    Args:
        shards: How the arrays lie.
        groups: Number of the selection that each array takes part in: 0, 1, …
        ties: Which of equal elements are retained at the threshold, "first" or "last".
    """
    body = functools.partial(_select, shards, groups, ties)
    run = jax.shard_map(
        body,
        mesh=shards.mesh,
        in_specs=(list(shards.specs), P()),
        out_specs=(list(shards.specs), P()),
        check_vma=False,
    )
    return jax.jit(run)


def _select(
    shards: Shards, groups: tuple[int, ...], ties: str, xs: list[Array], k: counting.Count
) -> tuple[list[Bool[Array, "..."]], list[Array]]:
    """Returns the masks of this device's parts, and the number of NaN of each whole array.

    Args:
        shards: How the arrays lie.
        groups: Selection of each array.
        ties: Which of equal elements are retained at the threshold, "first" or "last".
        xs: This device's parts.
        k: Number of elements to retain in each group, (G,).
    """
    axes = shards.mesh.axis_names
    mine = [_counts_here(shards, spec) for spec in shards.specs]
    keys = [sortable_bits(x) for x in xs]
    bits = jnp.iinfo(keys[0].dtype).bits
    n_groups = max(groups) + 1
    prefix_G = jnp.zeros(n_groups, keys[0].dtype)
    above_G = counting.Count(*(jnp.zeros(n_groups, jnp.uint32) for _ in range(2)))
    reached_G, nans, at = above_G, None, bits
    while at:
        digit = min(DIGIT, at)
        at -= digit
        high = jnp.zeros((n_groups, 1 << digit), jnp.uint32)
        low = jnp.zeros_like(high)
        for key, here, group in zip(keys, mine, groups, strict=True):
            same = here & (_shifted(key, at + digit) == prefix_G[group])
            found = _histogram(_shifted(key, at), same, digit)
            high, low = high.at[group].add(found >> 16), low.at[group].add(found & 0xFFFF)
        sent = [high.ravel(), low.ravel()]
        if nans is None:  # they travel with the first digit
            each = [
                jnp.sum(jnp.isnan(x) & here, dtype=jnp.uint32)
                for x, here in zip(xs, mine, strict=True)
            ]
            sent.append(jnp.stack(each))
        summed = jax.lax.psum(jnp.concatenate(sent), axes)
        high, low = (
            summed[i * high.size : (i + 1) * high.size].reshape(high.shape) for i in (0, 1)
        )
        nans = summed[2 * high.size :] if nans is None else nans
        # The largest digit that at least k elements reach, and how many are beyond it.
        from_G = _from_top(high, low, above_G)
        enough = from_G >= counting.Count(k.high[:, None], k.low[:, None])
        chosen_G, reached_G, above_G = _resolved(from_G, enough, above_G)
        prefix_G = (prefix_G << digit) | chosen_G.astype(prefix_G.dtype)
    surplus_G = reached_G.minus(k)
    plain = [key >= prefix_G[group] for key, group in zip(keys, groups, strict=True)]
    masks = jax.lax.cond(
        jnp.any((surplus_G.high | surplus_G.low) > 0),
        lambda: _without_ties(shards, groups, ties, keys, mine, prefix_G, surplus_G),
        lambda: plain,
    )
    assert nans is not None
    return masks, list(nans)


def _without_ties(
    shards: Shards,
    groups: tuple[int, ...],
    ties: str,
    keys: list[Array],
    mine: list[Array],
    threshold_G: Array,
    surplus_G: counting.Count,
) -> list[Array]:
    """Returns the masks without the surplus ties of each group, which end or begin the order."""
    tied = [key == threshold_G[group] for key, group in zip(keys, groups, strict=True)]
    each = [jnp.sum(t & here, dtype=jnp.uint32) for t, here in zip(tied, mine, strict=True)]
    totals = jax.lax.psum(jnp.stack(each), shards.mesh.axis_names)
    order = range(len(keys)) if ties == "last" else reversed(range(len(keys)))
    gone: dict[int, Array] = {}
    for i in order:
        left = counting.Count(surplus_G.high[groups[i]], surplus_G.low[groups[i]])
        gone[i] = jnp.minimum(totals[i], left.saturated())
        rest = left.minus(counting.count(gone[i]))
        surplus_G = counting.Count(
            surplus_G.high.at[groups[i]].set(rest.high), surplus_G.low.at[groups[i]].set(rest.low)
        )
    # At most one array of a group loses some of its ties: those at the largest places.
    places = [
        _places(shards, spec, shape, key.shape, ties)
        for spec, shape, key in zip(shards.specs, shards.shapes, keys, strict=True)
    ]
    partly = [(gone[i] > 0) & (gone[i] < totals[i]) for i in range(len(keys))]
    bound_G = _bounds(shards, groups, places, tied, mine, partly, gone)
    return [
        (key > threshold_G[group]) | (tie & jnp.where(part, place < bound_G[group], gone[i] == 0))
        for i, (key, group, tie, part, place) in enumerate(
            zip(keys, groups, tied, partly, places, strict=True)
        )
    ]


def _bounds(
    shards: Shards,
    groups: tuple[int, ...],
    places: list[Array],
    tied: list[Array],
    mine: list[Array],
    partly: list[Array],
    gone: dict[int, Array],
) -> Array:
    """Returns the place of each group from which exactly as many ties follow as go, (G,) uint32."""
    n_groups = max(groups) + 1
    wanted_G = jnp.zeros(n_groups, jnp.uint32)
    for i, group in enumerate(groups):
        wanted_G = wanted_G.at[group].add(jnp.where(partly[i], gone[i], 0))
    size = PLACE_DIGIT if n_groups == 1 else DIGIT
    at = max(1, max(math.prod(shape) - 1 for shape in shards.shapes).bit_length())
    bound_G, above_G = (jnp.zeros(n_groups, jnp.uint32) for _ in range(2))
    while at > 0:
        digit = min(size, at)
        at -= digit
        found_GxB = jnp.zeros((n_groups, 1 << digit), jnp.uint32)
        for i, group in enumerate(groups):
            same = _shifted(places[i], at + digit) == bound_G[group]
            counted = tied[i] & mine[i] & partly[i] & same
            found_GxB = found_GxB.at[group].add(_histogram(_shifted(places[i], at), counted, digit))
        found_GxB = jax.lax.psum(found_GxB, shards.mesh.axis_names)
        from_GxB = above_G[:, None] + _suffix(found_GxB)
        chosen_G, _, above_G = _resolved(from_GxB, from_GxB >= wanted_G[:, None], above_G)
        bound_G = (bound_G << digit) | chosen_G.astype(jnp.uint32)
    return bound_G


def _counts_here(shards: Shards, spec: P) -> Bool[Array, ""]:
    """Returns whether this device counts an array: one of those that hold the same part."""
    used = {name for entry in spec for name in _names(entry)}
    idle = [name for name in shards.mesh.axis_names if name not in used]
    return functools.reduce(
        jnp.logical_and, (jax.lax.axis_index(name) == 0 for name in idle), jnp.bool_(True)
    )


def _places(
    shards: Shards, spec: P, whole: tuple[int, ...], part: tuple[int, ...], ties: str
) -> UInt[Array, "..."]:
    """Returns the flat index of each element of this device's part in the whole array, uint32.

    With ties "last" it is counted from the end.
    """
    place, stride = jnp.zeros(part, jnp.uint32), 1
    for axis in reversed(range(len(whole))):
        names = _names(spec[axis]) if axis < len(spec) else ()
        number = jax.lax.axis_index(names) if names else 0
        first = jnp.asarray(number, jnp.uint32) * jnp.uint32(part[axis])
        index = jax.lax.broadcasted_iota(jnp.uint32, part, axis) + first
        place += index * jnp.uint32(stride % 2**32)
        stride *= whole[axis]
    return jnp.uint32((stride - 1) % 2**32) - place if ties == "last" else place


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _shifted(key: Array, by: int) -> Array:
    """Returns key >> by, 0 where nothing of it is left."""
    return key >> by if by < jnp.iinfo(key.dtype).bits else jnp.zeros_like(key)


def _histogram(keys: Array, counted: Array, digit: int) -> UInt[Array, " B"]:
    """Returns how often each value of the lowest bits occurs where `counted` is True."""
    bins = 1 << digit
    index = jnp.where(counted, (keys & (bins - 1)).astype(jnp.int32), bins)
    return jnp.zeros(bins, jnp.uint32).at[index.ravel()].add(1, mode="drop")


def _suffix(values_GxB: Array) -> Array:
    return jnp.flip(jnp.cumsum(jnp.flip(values_GxB, 1), axis=1, dtype=jnp.uint32), 1)


def _from_top(high_GxB: Array, low_GxB: Array, above_G: counting.Count) -> counting.Count:
    """Returns how many elements are in each bin, in those after it, and above all of them."""
    high_GxB, low_GxB = high_GxB + (low_GxB >> 16), low_GxB & 0xFFFF
    high_GxB = _suffix(high_GxB) + above_G.high[:, None]
    low_GxB = _suffix(low_GxB) + above_G.low[:, None]  # below 2^11 · 2^16 + 2^16
    return counting.Count(high_GxB + (low_GxB >> 16), low_GxB & 0xFFFF)


def _resolved(from_GxB: Any, enough_GxB: Array, above_G: Any) -> tuple[Array, Any, Any]:
    """Returns the largest digit that enough elements reach, and what reaches it and what is beyond.

    Args:
        from_GxB: Numbers of elements from each digit on, uint32 or a `Count`.
        enough_GxB: Whether these are enough, True up to some digit.
        above_G: Number of elements above all digits.
    """
    top = enough_GxB.shape[1] - 1
    chosen_G = jnp.maximum(jnp.sum(enough_GxB, axis=1), 1) - 1

    def taken(x_GxB: Array, at_G: Array) -> Array:
        return jnp.take_along_axis(x_GxB, at_G[:, None], axis=1)[:, 0]

    reached_G = jax.tree.map(lambda x: taken(x, chosen_G), from_GxB)
    beyond_G = jax.tree.map(
        lambda x, a: jnp.where(chosen_G == top, a, taken(x, jnp.minimum(chosen_G + 1, top))),
        from_GxB,
        above_G,
    )
    return chosen_G, reached_G, beyond_G
