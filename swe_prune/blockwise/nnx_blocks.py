"""NNX models for block-by-block pruning, seen as the Linen models that `block_graph` runs.

An NNX module is split into its graph and its state, whose leaves go into nested dicts like those of
a Linen model: "params" for `nnx.Param`, "rest" for everything else. Each call merges a fresh
module from them, whose blocks report to the interceptor that is at work when they are called.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from swe_prune import tree
from swe_prune.layout.trace import inputs_of

_INTERCEPTOR: contextvars.ContextVar[Any] = contextvars.ContextVar("interceptor", default=None)


@contextlib.contextmanager
def intercept(interceptor: Callable[..., Any]) -> Iterator[None]:
    """Lets an interceptor, as of `flax.linen.intercept_methods`, see the calls of NNX blocks."""
    token = _INTERCEPTOR.set(interceptor)
    try:
        yield
    finally:
        _INTERCEPTOR.reset(token)


@dataclasses.dataclass(frozen=True)
class Functional:
    """An NNX module as a function of its variables; hashable, and free of arrays.

    Attributes:
        graph: Graph definition of the module.
        structure: Structure of its state.
        names: Names of the leaves of the state.
    """

    graph: Any
    structure: Any
    names: tuple[str, ...]

    def merged(self, variables: Mapping[str, PyTree]) -> Any:
        """Returns a new module with these variables, and None for those that are missing."""
        given = {
            name: leaf for part in variables.values() for name, leaf in tree.named_leaves(part)
        }
        return nnx.merge(self.graph, self.structure.unflatten([given.get(n) for n in self.names]))

    def apply(
        self, variables: Mapping[str, PyTree], *args: Any, method: str = "__call__", **kwargs: Any
    ) -> Any:
        """Returns what the module's method returns."""
        return getattr(self.merged(variables), method)(*args, **kwargs)


def functional(module: nnx.Module) -> Functional:
    """Returns a module without its arrays."""
    graph, state = nnx.split(module)
    names = tuple(name for name, _ in tree.named_leaves(state))
    return Functional(graph, jax.tree.structure(state), names)


def variables_of(module: nnx.Module, params: PyTree) -> dict[str, dict[str, Any]]:
    """Returns a module's variables as nested dicts, with the given values of its parameters.

    Args:
        module: NNX module.
        params: State, pure dict or module with the values of the parameters.
    """
    given = dict(tree.named_leaves(params))
    _, weights, rest = nnx.split(module, nnx.Param, ...)
    own, others = (dict(tree.named_leaves(part)) for part in (weights, rest))
    found = {"params": tree.nested({name: given.get(name, leaf) for name, leaf in own.items()})}
    if others:
        found["rest"] = tree.nested({name: given.get(name, leaf) for name, leaf in others.items()})
    return found


def runner(
    module: nnx.Module, paths: Sequence[str], call: Callable[[Any, Any], Any] | None
) -> Callable[[Any, Any], Any]:
    """Returns the function of (variables, batch) that runs a module whose blocks report.

    Args:
        module: NNX module.
        paths: Paths of the blocks, such as "layers/0".
        call: Function of (module, batch). None: the module applied to the batch, or to its
            "inputs".
    """
    own = functional(module)

    def run(variables: Any, batch: Any) -> Any:
        fresh = own.merged(variables)
        for path in paths:
            _reporting(_at(fresh, path), path)
        if call is not None:
            return call(fresh, batch)
        return fresh(inputs_of(batch))

    return run


def _at(module: Any, path: str) -> Any:
    for part in path.split("/"):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


@dataclasses.dataclass(frozen=True)
class _Module:
    """What an interceptor asks of the module whose method is called."""

    instance: Any
    path: tuple[str, ...]
    scope: bool = True

    def unbind(self) -> tuple[Functional, None]:
        reporting = type(self.instance)
        self.instance.__class__ = reporting.__base__
        try:
            return functional(self.instance), None
        finally:
            self.instance.__class__ = reporting


@dataclasses.dataclass(frozen=True)
class _Call:
    module: _Module
    method_name: str = "__call__"


def _reporting(block: Any, path: str) -> None:
    """Lets the calls of one block, an instance, go through the interceptor."""
    block.__class__ = _reporting_class(type(block), path)


@functools.cache
def _reporting_class(plain: type, path: str) -> type:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(plain.__call__, self)
        interceptor = _INTERCEPTOR.get()
        if interceptor is None:
            return call(*args, **kwargs)
        return interceptor(call, args, kwargs, _Call(_Module(self, tuple(path.split("/")))))

    return type(plain.__name__, (plain,), {"__call__": __call__, "__module__": plain.__module__})
