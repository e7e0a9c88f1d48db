"""Mapping of parameters to slices of stored tensors.

`bind` applies a table of tensor names to one model. `ParamSlice.read` reads a parameter, or the
slice of it for one device, from the stored tensor. `StoredTensor.write` joins the parameters again.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from swe_prune import tree
from swe_prune.arguments import checked
from swe_prune.config import PER_LAYER, ModelConfig
from swe_prune.interop.tensor_rows import AS_IS, IN_OUT, OUT_IN, Row, Table
from swe_prune.models import phi3v

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ParamSlice:
    """A parameter as a slice of a stored tensor.

    Attributes:
        name: Name of the parameter, such as `"block_0/mlp/up/kernel"`.
        shape: Shape of the parameter, or of one copy of it.
        start: Index of the parameter's first output in the stored tensor.
        layout: Layout of the stored tensor.
        heads: Number of heads if the halves of each head are interleaved, else None.
        copy: Index along the parameter's first axis, if each has a tensor of its own, else None.
        turn: If several parameters take turns head by head, the number of heads, this parameter's
            turn, and the number of turns.
    """

    name: str
    shape: Shape
    start: int
    layout: str
    heads: int | None = None
    copy: int | None = None
    turn: tuple[int, int, int] | None = None

    def of(self, param: Any) -> Any:
        """Returns the part of the parameter that this tensor holds: all of it, or one copy."""
        return param if self.copy is None else param[self.copy]

    def read(self, stored: Any, index: tuple[slice, ...]) -> np.ndarray:
        """Returns the parameter at `index`, in the stored dtype.

        Args:
            stored: Object that returns a numpy array when indexed with one slice per axis. Only the
                requested slice is read, except for heads that are interleaved or take turns.
            index: Slice for each axis of the parameter.
        """
        if self.turn is not None:
            return self._own_turn(stored)[index]
        if self.heads is not None:
            whole = tuple(slice(0, size) for size in self.shape)
            return _halves(self._cut(stored, whole), self.heads)[index]
        bounds = zip(index, self.shape, strict=True)
        return self._cut(stored, tuple(slice(*part.indices(size)) for part, size in bounds))

    def _own_turn(self, stored: Any) -> np.ndarray:
        assert self.turn is not None
        heads, at, turns = self.turn
        whole = stored[(slice(None),) * len(self.shape)]
        split = whole.reshape(heads, turns, -1, *whole.shape[1:])[:, at]
        own = split.reshape(-1, *whole.shape[1:])
        return own.T if self.layout == OUT_IN else own

    def _cut(self, stored: Any, index: tuple[slice, ...]) -> np.ndarray:
        # Shift the slice of the outputs to the parameter's position in the stored tensor.
        outputs = 0 if self.layout == AS_IS else 1
        moved = list(index)
        moved[outputs] = slice(index[outputs].start + self.start, index[outputs].stop + self.start)
        if self.layout == OUT_IN:
            return stored[moved[1], moved[0]].T
        return stored[tuple(moved)]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A stored tensor and the parameters in it.

    Attributes:
        name: Name in the file.
        shape: Shape in the file.
        parts: Parameters in the tensor, in the order of its outputs.
        unfolded: Shape by the layout, if the file has the same numbers in another shape.
    """

    name: str
    shape: Shape
    parts: tuple[ParamSlice, ...]
    unfolded: Shape | None = None

    def opened(self, stored: Any) -> Any:
        """Returns an open tensor in the shape that its parts are read from."""
        return stored if self.unfolded is None else stored[...].reshape(self.unfolded)

    def join(self, values: Sequence[Any]) -> np.ndarray:
        """Joins the values of the parts, in their order, to the stored tensor, in their dtype."""
        pieces = []
        for part, value in zip(self.parts, values, strict=True):
            piece = np.asarray(value)
            if part.heads is not None:
                piece = _halves(piece, part.heads, back=True)
            pieces.append(piece.T if part.layout == OUT_IN else piece)
        if len(pieces) == 1:
            return np.ascontiguousarray(pieces[0]).reshape(self.shape)
        turn = self.parts[0].turn
        if turn is not None:
            by_head = [piece.reshape(turn[0], -1, *piece.shape[1:]) for piece in pieces]
            return np.stack(by_head, axis=1).reshape(self.shape)
        return np.concatenate(pieces, axis=1 if self.parts[0].layout == IN_OUT else 0)


def bind(table: Table, config: ModelConfig, vocab_size: int) -> list[StoredTensor]:
    """Returns the stored tensors of a model, which contain each of its parameters once."""
    shapes = param_shapes(config, vocab_size)
    bound = []
    for row in table.rows:
        for layer in range(_layers(row.stored, config)):
            names = [name.format(i=layer, v=layer) for name in row.params]
            # Skip rows for parameters that this model does not have.
            if names[0] not in shapes:
                continue
            if "{e}" not in row.stored:
                bound.append(_bound(row, layer, names, shapes, config))
                continue
            own = {name: shapes[name][1:] for name in names}
            for copy in range(shapes[names[0]][0]):
                bound.append(_bound(row, layer, names, own, config, copy))
    return bound


def param_shapes(config: ModelConfig, vocab_size: int) -> dict[str, Shape]:
    """Returns the shape of each parameter of the model by name, without allocating any."""
    vision = None if config.vision is None else dataclasses.replace(config.vision, layers=2)
    shapes = {}
    for layer in range(config.layers):
        # Layers of the same widths are traced once: no parameter depends on the other settings.
        widths = {
            name: getattr(config.of_layer(layer), name)
            for name in ("hidden", "heads", "kv_heads", "head_width")
        }
        one = dataclasses.replace(
            config, layers=1, scan_layers=False, remat=False, dropout=0.0, sliding_theta=None,
            vision=vision, **dict.fromkeys(PER_LAYER, ()), **widths,
        )  # fmt: skip
        for name, shape in _shapes_of_one_layer(one, vocab_size):
            if "block_1/" in name:  # of the vision tower, which has two at least
                continue
            if config.vision is not None and name.startswith("vision/block_0/"):
                for number in range(config.vision.layers):
                    shapes[name.replace("block_0/", f"block_{number}/")] = shape
                continue
            shapes[name.replace("block_0/", f"block_{layer}/")] = shape
    return shapes


def _layers(stored: str, config: ModelConfig) -> int:
    if "{v}" in stored and config.vision is not None:
        return config.vision.layers
    return config.layers if "{i}" in stored else 1


@checked
def abstract_params(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Returns the parameters of the model as float32 shapes in a nested dict."""
    shapes = param_shapes(config, vocab_size)
    return tree.nested({k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()})


@functools.lru_cache(maxsize=64)  # tracing takes longer than everything else for a small model
def _shapes_of_one_layer(config: ModelConfig, vocab_size: int) -> tuple[tuple[str, Shape], ...]:
    model = phi3v.build(config, vocab_size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    made = jax.eval_shape(model.init, key, phi3v.example(config, 1))["params"]
    return tuple((name, tuple(leaf.shape)) for name, leaf in tree.named_leaves(made))


def _bound(
    row: Row,
    layer: int,
    names: Sequence[str],
    shapes: Mapping[str, Shape],
    config: ModelConfig,
    copy: int | None = None,
) -> StoredTensor:
    parts, start = [], 0
    for at, name in enumerate(names):
        heads = None
        turn = (config.heads, at, len(names)) if row.by_head else None
        if row.interleaved:
            heads = config.key_heads if "/key/" in name else config.heads
        parts.append(ParamSlice(name, shapes[name], start, row.layout, heads, copy, turn))
        # The next parameter follows along the outputs.
        start += shapes[name][0 if row.layout == AS_IS else 1]
    first = parts[0].shape
    shape = (start, *first[1:]) if row.layout == AS_IS else (first[0], start)
    shape = shape[::-1] if row.layout == OUT_IN else shape
    name = row.stored.format(i=layer, v=layer, e=copy)
    if row.fold is None:
        return StoredTensor(name, shape, tuple(parts))
    return StoredTensor(name, row.fold(shape), tuple(parts), unfolded=shape)


def _halves(x: np.ndarray, heads: int, *, back: bool = False) -> np.ndarray:
    """De-interleaves the halves of each head along the last axis, or interleaves them if `back`.

    >>> _halves(np.array([0, 3, 1, 4, 2, 5]), 1)
    array([0, 1, 2, 3, 4, 5])
    """
    split = (heads, 2, -1) if back else (heads, -1, 2)
    return x.reshape(*x.shape[:-1], *split).swapaxes(-1, -2).reshape(x.shape)
