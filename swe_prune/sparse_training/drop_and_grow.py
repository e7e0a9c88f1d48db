"""RigL and SET: at a constant sparsity, exchange the weakest weights for new ones.

In every tensor, of a active weights n = ⌊fraction · a⌋ with the smallest |w| are dropped, then the
n with the largest growth score are grown among all that the drop did not keep. The ones just
dropped are among those, and may be grown again. Ties are broken by flat index: of equal weights
the first stay, of equal candidates the first are grown.

Evci et al., "Rigging the lottery" (ICML 2020), with its code's order of drop and growth; Mocanu et
al., "Scalable training of artificial neural networks with adaptive sparse connectivity" (2018).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, UInt32

from swe_prune import counting, masks, select, tree
from swe_prune.arguments import checked
from swe_prune.errors import InputError, check_choice
from swe_prune.layout import copies_of
from swe_prune.masks.fitting import check_fits, check_mask

REGROWN = ("keep", "reset")
"""Value of a weight that is dropped and grown in one update: "keep" its own, or "reset" to 0."""


@checked
def drop_and_grow(
    params: PyTree,
    mask: PyTree,
    opt_state: PyTree,
    fraction: float | Float[Array, ""],
    grow_scores: PyTree,
    *,
    regrown: str = "keep",
    layout: PyTree | None = None,
) -> tuple[PyTree, PyTree, PyTree]:
    """Returns parameters, mask and optimizer state after one exchange, counts unchanged.

    Newly grown weights start at 0, and their moments too (`masks.hold_moments`). Dropped weights
    and their moments become 0 as well.

    Args:
        params: Pytree of weights.
        mask: Bool pytree, None where dense.
        opt_state: State of any optax optimizer, or None.
        fraction: Share of each tensor's active weights to exchange, in [0, 1]; may be traced. It
            is read as float32 without loss: 0.7 of 10 is 7.
        grow_scores: Float pytree like the parameters; only its masked leaves are read.
        regrown: Value of a weight that is dropped and grown in the same update: "keep" leaves the
            weight and its moments as they were, "reset" makes them 0.
        layout: Pytree of `layout.Axes` like the parameters; each copy of a stacked tensor
            exchanges by itself.

    Raises:
        InputError: The fraction is outside [0, 1], `regrown` is unknown, a mask is not bool or
            does not fit its weight or score, there is no mask at all, or a value is NaN (in a
            traced call a NaN is the first to be dropped and the last to be grown).
    """
    _check(params, mask, fraction, grow_scores, regrown)
    copies = copies_of(layout)
    grown_by_name: dict[str, Array] = {}

    def exchange(name: str, keep: Array, weight: Array, score: Array) -> Array:
        # With copies, counts and selections run over all other axes.
        stacked = copies(name, keep.shape)
        axes = tuple(a for a in range(keep.ndim) if a not in stacked) if stacked else None
        active = counting.count_each([keep], axes)[0]
        n = exchanged(active, fraction)
        kept = counting.count(active - n) if stacked else active - n
        more = counting.count(n) if stacked else n
        by_size = select.restrict(jnp.abs(weight), keep, name)
        stay = select.top_k_mask(by_size, kept, axes=axes, name=name)
        by_score = select.restrict(score, ~stay, name)
        grown = select.top_k_mask(by_score, more, axes=axes, name=name)
        grown_by_name[name] = stay | grown
        return stay

    stay = tree.map_named(exchange, mask, params, grow_scores)
    new = tree.map_named(lambda name, _: grown_by_name[name], mask)
    # What was active and still is has a value to go on with; of the regrown only if they keep it.
    held = stay if regrown == "reset" else tree.map_tracked(jnp.logical_and, mask, new)
    return masks.apply(params, held), new, masks.hold_moments(opt_state, held)


@checked
def rigl_update(
    params: PyTree,
    mask: PyTree,
    opt_state: PyTree,
    fraction: float | Float[Array, ""],
    grads: PyTree,
    *,
    regrown: str = "keep",
    layout: PyTree | None = None,
) -> tuple[PyTree, PyTree, PyTree]:
    """Returns the result of `drop_and_grow` by the magnitude of the dense gradient: RigL.

    Use `schedules.Constant(…).is_due(step)` for when to update, `schedules.cosine_drop_fraction`
    for the fraction, and `jax.lax.cond` to skip the work between updates.

    Args:
        params: Pytree of weights.
        mask: Bool pytree, None where dense.
        opt_state: State of any optax optimizer, or None.
        fraction: Share of each tensor's active weights to exchange; may be traced.
        grads: Dense gradient at the masked weights, as `jax.grad` gives it.
        regrown: One of `REGROWN`.
        layout: Pytree of `layout.Axes` like the parameters; see `drop_and_grow`.

    Raises:
        InputError: Errors of `drop_and_grow`.

    >>> w, m = {"w": jnp.array([3.0, 1.0, 0.0])}, {"w": jnp.array([True, True, False])}
    >>> w, m, _ = rigl_update(w, m, None, 0.5, {"w": jnp.array([0.0, 1.0, -2.0])})
    >>> w["w"].tolist(), m["w"].tolist()
    ([3.0, 0.0, 0.0], [True, False, True])
    """
    scores = tree.map_leaves(
        lambda _, keep, g: None if keep is None or g is None else jnp.abs(g), mask, grads
    )
    return drop_and_grow(params, mask, opt_state, fraction, scores, regrown=regrown, layout=layout)


@checked
def set_update(
    params: PyTree,
    mask: PyTree,
    opt_state: PyTree,
    fraction: float | Float[Array, ""],
    key: PRNGKeyArray,
    *,
    regrown: str = "keep",
    layout: PyTree | None = None,
) -> tuple[PyTree, PyTree, PyTree]:
    """Returns the result of `drop_and_grow` with random growth: sparse evolutionary training.

    Args:
        params: Pytree of weights.
        mask: Bool pytree, None where dense.
        opt_state: State of any optax optimizer, or None.
        fraction: Share of each tensor's active weights to exchange; may be traced.
        key: Random key, a new one for every update; each tensor draws from its own stream, named
            by its path.
        regrown: One of `REGROWN`.
        layout: Pytree of `layout.Axes` like the parameters; see `drop_and_grow`.

    Raises:
        InputError: Errors of `drop_and_grow`.
    """
    check_mask(mask)
    scores = tree.map_named(
        lambda name, keep: jax.random.uniform(tree.named_key(key, name), keep.shape),
        mask,
    )
    return drop_and_grow(params, mask, opt_state, fraction, scores, regrown=regrown, layout=layout)


rigl = rigl_update
"""Same as `rigl_update`."""
set = set_update
"""Same as `set_update`."""


def exchanged(active: UInt32[Array, ""], fraction: float | Float[Array, ""]) -> UInt32[Array, ""]:
    """Returns ⌊fraction · active⌋, where both may be traced: exactly, as for the decimal meant.

    float32(0.7) · 10 is less than 7, which 0.7 of 10 is. So below 2^22 active weights a product
    that misses an integer by no more than float32 rounds off, a share of 2^-22, is that integer.
    """
    fraction = jnp.asarray(fraction, jnp.float32)
    active = active.astype(jnp.uint32)
    n = counting.share(counting.count(active), fraction, up=False).saturated()
    # A product of floats is the same on every backend; a quotient is not.
    nearly = fraction * active.astype(jnp.float32) * (1 + 2**-22)
    rounded_off = (active < 2**22) & (n < active) & ((n + 1).astype(jnp.float32) <= nearly)
    return n + rounded_off.astype(jnp.uint32)


def _check(params: PyTree, mask: PyTree, fraction: Any, scores: PyTree, regrown: str) -> None:
    check_choice(regrown, REGROWN, "regrown")
    if not isinstance(fraction, Tracer) and not 0 <= float(fraction) <= 1:
        raise InputError(
            f"fraction = {fraction!r} is not a share in [0, 1]; give that of the active weights to "
            "exchange"
        )
    if not jax.tree.leaves(mask):
        raise InputError("no tensor has a mask, so nothing can be exchanged; make masks first")

    def leaf(name: str, keep: Any, weight: Any, score: Any) -> None:
        check_fits(name, keep, weight)
        check_fits(name, keep, score, "growth score")

    tree.map_named(leaf, mask, params, scores)
