"""How the blocks of a Linen or NNX model are run alone, one after the other.

The model is traced once, and every call of a block is watched. What a block is called with comes
from one of three places: it is what the block before returned; it is what the first block was also
called with, such as an attention mask; or it is a constant, such as a flag. The tracer's identity
tells which, so nothing is assumed of a block's signature, and a model that computes anything
between its blocks is refused instead of being run wrongly.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.core.tracers import current_trace
from jax.core import Tracer
from jaxtyping import Array, PyTree

from swe_prune.blockwise import nnx_blocks
from swe_prune.errors import InputError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a leaf of a block's arguments comes from.

    Attributes:
        kind: "made", what the block before returned; "given", what the first block was called
            with; "constant".
        value: Index of the leaf there, or the constant.
    """

    kind: str
    value: Any


@dataclasses.dataclass(frozen=True)
class Wire:
    """A block that can be run alone.

    Attributes:
        path: Path of the block's module and variables, such as "layers/block_0".
        module: Unbound Linen module, or an NNX module as a function of its variables.
        method: Name of the method that the model calls.
        sources: Source of each leaf of the flattened (args, kwargs).
        treedef: Tree structure of (args, kwargs).
    """

    path: str
    module: nn.Module | nnx_blocks.Functional
    method: str
    sources: tuple[Source, ...]
    treedef: Any

    def run(self, variables: PyTree, given: Sequence[Any], made: Sequence[Any]) -> list[Array]:
        """Returns the leaves of what the block returns."""
        places = {"given": given, "made": made}
        leaves = [
            source.value if source.kind == "constant" else places[source.kind][source.value]
            for source in self.sources
        ]
        args, kwargs = self.treedef.unflatten(leaves)
        return jax.tree.leaves(self.module.apply(variables, *args, method=self.method, **kwargs))

    def alike(self, other: "Wire") -> bool:
        """Returns whether another block is this one with other weights, to compile it once."""
        return (
            type(self.module) is type(other.module)
            and self.method == other.method
            and self.treedef == other.treedef
            and len(self.sources) == len(other.sources)
            and all(
                a.kind == b.kind and _same(a.value, b.value)
                for a, b in zip(self.sources, other.sources, strict=True)
            )
            and all(
                _same(getattr(self.module, field.name), getattr(other.module, field.name))
                for field in dataclasses.fields(self.module)
                if field.name not in ("name", "parent")
            )
        )


def _same(a: Any, b: Any) -> bool:
    """Returns whether two settings are equal; arrays, which compare elementwise, if identical."""
    return a is b or (type(a) is type(b) and not hasattr(a, "shape") and bool(a == b))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Activations:
    """Between two blocks, what the next is called with, for one batch.

    Attributes:
        given: Leaves that the first block was called with; None where no later block needs them.
        made: Leaves that the previous block returned.
        kind: Index of the batch's kind; the constants of a block depend on it.
    """

    given: list[Any]
    made: list[Any]
    kind: int = dataclasses.field(metadata={"static": True})


def as_second(first: Wire, second: Wire) -> tuple[Wire, dict[int, int]]:
    """Returns the first block with the second block's input signature, if they are compatible.

    The second block reads leaves that the first returned; the first read leaves from before the
    blocks. With the same signature the two are compiled once.

    Returns:
        Wire, and a map from indices in `made` to the indices in `given` of the leaves to move.
    """
    moved: dict[int, int] = {}
    if first.treedef != second.treedef:
        return first, moved
    sources = []
    for own, other in zip(first.sources, second.sources, strict=True):
        meets = own.kind == "given" and other.kind == "made"
        if meets and moved.setdefault(other.value, own.value) != own.value:
            return first, {}  # two that differ here are one and the same there
        sources.append(other if meets else own)
    return dataclasses.replace(first, sources=tuple(sources)), moved


class _Reached(Exception):
    """The first block was called: what comes after it need not be traced."""


def trace(run: Callable[[], Any], paths: Sequence[str]) -> list[Wire]:
    """Returns the blocks in the order in which the model calls them.

    To be called inside a trace, such as that of `jax.eval_shape`.

    Args:
        run: Function that applies the model.
        paths: Paths of the blocks.

    Raises:
        InputError: A block that is not called, or twice, or is given what cannot be wired.
    """
    wires: list[Wire] = []
    given: list[Any] = []
    made: list[Any] = []
    outside = current_trace()

    def on_block(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path = "/".join(context.module.path)
        if any(wire.path == path for wire in wires):
            raise InputError(
                f"block {path!r} is called more than once, so it has no one place in the order of "
                "blocks; leave it out of blocks="
            )
        _check_plain(path, outside)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        if not wires:
            given.extend(leaves)
        sources = tuple(_source(path, leaf, made, given) for leaf in leaves)
        module, _ = context.module.unbind()
        wires.append(Wire(path, module, context.method_name, sources, treedef))
        result = call(*args, **kwargs)
        made[:] = jax.tree.leaves(result)
        return result

    with _intercepting(_at(paths, on_block)):
        run()
    missing = [path for path in paths if path not in [wire.path for wire in wires]]
    if missing:
        raise InputError(
            f"block {missing[0]!r} is not called by the model; leave it out of blocks="
        )
    return wires


def into_first(run: Callable[[], Any], paths: Sequence[str]) -> list[Any]:
    """Returns the leaves that the first block is called with, except constants.

    The model is run up to there and no further. The others are None.
    """
    reached: list[Any] = []

    def on_block(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        reached.extend(jax.tree.leaves((args, kwargs)))
        raise _Reached

    try:
        with _intercepting(_at(paths, on_block)):
            run()
    except _Reached:
        pass
    return [leaf if isinstance(leaf, Tracer) else None for leaf in reached]


def residuals(run: Callable[[], Any], paths: Sequence[str]) -> list[Any]:
    """Returns the first array that the first block is called with, and that each block returns.

    To be called inside a trace, such as that of `jax.jit`.

    Raises:
        InputError: A block that is called inside of a transformation such as nn.scan.
    """
    found: list[Any] = []
    outside = current_trace()

    def on_block(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        _check_plain("/".join(context.module.path), outside)
        result = call(*args, **kwargs)
        for values in (result,) if found else ((args, kwargs), result):
            found.append(next(x for x in jax.tree.leaves(values) if isinstance(x, Tracer)))
        return result

    with _intercepting(_at(paths, on_block)):
        run()
    return found


@contextlib.contextmanager
def _intercepting(interceptor: Callable[..., Any]) -> Iterator[None]:
    with nn.intercept_methods(interceptor), nnx_blocks.intercept(interceptor):
        yield


def _at(paths: Sequence[str], on_block: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an interceptor of the blocks' calls, of those from inside themselves not again."""
    inside: list[str] = []

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.scope is None or context.method_name == "setup":
            return call(*args, **kwargs)
        path = "/".join(context.module.path)
        if path not in paths or path in inside:
            return call(*args, **kwargs)
        inside.append(path)
        try:
            return on_block(call, args, kwargs, context)
        finally:
            inside.pop()

    return interceptor


def _check_plain(path: str, outside: Any) -> None:
    if current_trace() != outside:
        raise InputError(
            f"block {path!r} is called inside a transformation such as nn.remat or nn.scan, or a "
            "jit of call=, and cannot be run alone; build the model for pruning without it"
        )


def _source(path: str, leaf: Any, made: Sequence[Any], given: Sequence[Any]) -> Source:
    if not isinstance(leaf, Tracer):
        return Source("constant", leaf)
    for kind, leaves in (("made", made), ("given", given)):
        for index, other in enumerate(leaves):
            if other is leaf:
                return Source(kind, index)
    raise InputError(
        f"block {path!r} is called with an array of shape {leaf.shape} that is neither what the "
        "block before returned nor what the first block was called with; name in blocks= those on "
        "one side of what is computed there, and prune the others in a call of their own"
    )


def find(names: Sequence[str], blocks: str | Sequence[str]) -> list[str]:
    """Returns the paths of blocks, by a rule or by name.

    Args:
        names: Names of all weights.
        blocks: Regular expression that matches whole paths, or the paths themselves.

    Raises:
        InputError: Nothing matches, a path under which there is no weight, or one inside another.

    >>> find(["head/kernel", "block_0/up/kernel", "block_1/up/kernel"], r"block_[0-9]+")
    ['block_0', 'block_1']
    """
    known = _folders(names)
    if isinstance(blocks, str):
        paths = [path for path in known if re.fullmatch(blocks, path)]
    else:
        paths = list(blocks)
    for path in paths or [str(blocks)]:
        if path not in known:
            raise InputError(
                f"blocks= names {path!r}, which holds no weight; {did_you_mean(path, known)}"
            )
    for path in paths:
        inner = [other for other in paths if other.startswith(path + "/")]
        if inner or paths.count(path) > 1:
            raise InputError(
                f"blocks= names {path!r} and {(inner or [path])[0]!r}, which share weights; name "
                "each block once"
            )
    return paths


def _folders(names: Sequence[str]) -> list[str]:
    parts = [name.split("/")[:-1] for name in names]
    return list(dict.fromkeys("/".join(p[:n]) for p in parts for n in range(1, len(p) + 1)))


def part(variables: Mapping[str, PyTree], path: str) -> dict[str, PyTree]:
    """Returns the variables of the module at a path, of every collection that has any."""
    found = {}
    for collection, node in variables.items():
        for key in path.split("/"):
            node = node.get(key) if isinstance(node, Mapping) else None
        if node is not None:
            found[collection] = node
    return found


def without(variables: Mapping[str, PyTree], paths: Sequence[str]) -> dict[str, PyTree]:
    """Returns the variables less those of the modules at the paths."""

    def cut(node: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(node, Mapping):
            return node
        return {
            key: cut(value, (*path, key))
            for key, value in node.items()
            if "/".join((*path, key)) not in paths
        }

    return {collection: cut(node, ()) for collection, node in variables.items()}


def leaf(params: PyTree, name: str) -> Any:
    """Returns the leaf of nested dicts at a name."""
    for key in name.split("/"):
        params = params[key]
    return params
