"""Capture of the layer inputs of a Linen model, without changing the model's code.

`flax.linen.intercept_methods` intercepts every call of every module. The sums are stored with
`sow`, so that they also leave `nn.remat` and `nn.jit`, which are traced separately. They leave
`nn.scan` and `nn.vmap` if these list the collection in their variable_axes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict, meta
from flax.core.scope import union_filters
from flax.core.tracers import current_trace
from jaxtyping import Array

from swe_prune.calibration.layers import rows
from swe_prune.errors import InputError

COLLECTION = "calibration"
_SUMS = "input_sums"


def sums(
    run: Callable[[], Any],
    wanted: Mapping[str, Any],
    *,
    hessian: bool,
    dense_like: tuple[type, ...] = (),
) -> dict[str, dict[str, Array]]:
    """Returns sums over the layer inputs of each wanted kernel that `run()` uses.

    Args:
        run: Function that applies Linen modules.
        wanted: Mapping whose keys are the names of the kernels to measure, such as
            "block_0/mlp/up/kernel".
        hessian: Whether to sum the outer products too.
        dense_like: Custom layer classes that compute x @ kernel over the last axis.

    Returns:
        Sums by kernel name: "square", Σ x², float32, with the shape of the kernel's input axes,
        and with `hessian` also "outer", Σ x xᵀ, float32, R x R. In a scan both have the layers as
        their first axis.

    Raises:
        InputError: If a layer is of an unknown kind, or inside a transformation that discards the
            sums.
    """
    found: list[Any] = []
    roots: list[Any] = []
    measuring: set[str] = set()
    outside = current_trace()

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.scope is None or context.method_name == "setup":
            return call(*args, **kwargs)
        root = module.scope.root
        # The outermost call is the application, whose root scope collects the sums.
        if not roots and module.scope is root:
            _check_trace(outside, "call=")
            roots.append(root)
            return _from_root(root, lambda: measured(call, args, kwargs, context), found, roots)
        return measured(call, args, kwargs, context)

    def measured(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if roots and module.scope.root is roots[0]:
            _open(module.scope)
        name = "/".join((*module.path, "kernel"))
        # A subclass that calls super().__call__ is intercepted twice; count its input once.
        if name not in wanted or context.method_name != "__call__" or name in measuring:
            return call(*args, **kwargs)
        _store(name, module, [*args, *kwargs.values()][0], hessian, dense_like)
        measuring.add(name)
        try:
            return call(*args, **kwargs)
        finally:
            measuring.discard(name)

    with nn.intercept_methods(interceptor):
        run()
    return _added(found)


def _check_trace(outside: Any, what: str) -> None:
    if current_trace() != outside:
        raise InputError(
            f"{what} transforms the model's application with jax (jit, vmap, scan …), which "
            "discards the measurements; apply the model directly, it is compiled as a whole"
        )


def _from_root(root: Any, call: Callable[[], Any], found: list[Any], roots: list[Any]) -> Any:
    """Returns the result of `call`, with the collection mutable while it runs."""
    before = root.mutable
    root.mutable = union_filters(before, COLLECTION)
    try:
        result = call()
        found.append(root.variables().get(COLLECTION, {}))
    finally:
        root.mutable = before  # so that the application does not return it
        roots.clear()
    return result


def _open(scope: Any) -> None:
    """Makes the collection mutable from a scope up to its root.

    A child that was created in `setup` predates the change to the root.
    """
    while scope is not None and not scope.is_mutable_collection(COLLECTION):
        scope.mutable = union_filters(scope.mutable, COLLECTION)
        scope = scope.parent


def _store(
    name: str, module: nn.Module, x: Any, hessian: bool, dense_like: tuple[type, ...]
) -> None:
    x_NxR, shape = rows(name, module, x, dense_like)
    values = {"square": jnp.sum(x_NxR**2, axis=0).reshape(shape)}
    if hessian:
        # Full float32: the default precision of accelerators rounds the inputs to fewer bits.
        values["outer"] = jnp.matmul(x_NxR.T, x_NxR, precision=jax.lax.Precision.HIGHEST)
    stored = module.sow(COLLECTION, _SUMS, values, init_fn=lambda: None, reduce_fn=_add)
    if not stored:
        raise InputError(
            f"{name!r} is used inside a transformation such as nn.scan or nn.vmap, which discards "
            f"the measurements; list {COLLECTION!r} in its variable_axes next to 'params'"
        )


def _add(total: Any, values: Any) -> Any:
    return values if total is None else jax.tree.map(jnp.add, total, values)


def _added(found: list[Any]) -> dict[str, dict[str, Array]]:
    sums: dict[str, dict[str, Array]] = {}

    def walk(path: tuple[str, ...], node: Any) -> None:
        for key, value in node.items():
            if key == _SUMS:
                name = "/".join((*path, "kernel"))
                sums[name] = _add(sums.get(name), dict(meta.unbox(value)))
            elif isinstance(value, (dict, FrozenDict)):
                walk((*path, key), value)

    for collection in found:
        walk((), collection)
    return sums
