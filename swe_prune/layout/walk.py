"""A walk through the computation of a function that follows every weight to its products.

The walk reads the jaxpr of `fn(params, batch)`. For each value it knows which axes of which weights
the value is made of (`views.View`), whether it depends on the batch, and from which products it
comes. Where a weight meets the activations in a `dot_general`, a `ragged_dot` or a convolution,
the walk notes the roles of its axes, and hands the other operand to `measure`.

With values, the walk also computes everything, so that it can be traced and compiled: this is how
calibration measures the inputs of the products of any function, without touching the function.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from swe_prune.layout import views
from swe_prune.layout.views import Piece, View

Sums = dict[Any, Any]

_CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "core_closed_call", "named_call", "custom_lin"),
    *("remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"),
    "custom_vjp_call_jaxpr",
)
_INNER = ("call_jaxpr", "jaxpr", "fun_jaxpr")
_ELEMENTWISE = frozenset(
    (
        *("abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "complex", "conj"),
        *(
            "copy",
            "copy_p",
            "cos",
            "cosh",
            "device_put",
            "digamma",
            "div",
            "eq",
            "erf",
            "erf_inv",
            "erfc",
        ),
        *("exp", "exp2", "expm1", "floor", "ge", "gt", "imag", "integer_pow", "is_finite"),
        *(
            "le",
            "lgamma",
            "log",
            "log1p",
            "logistic",
            "lt",
            "max",
            "min",
            "mul",
            "name",
            "ne",
            "neg",
            "nextafter",
        ),
        *("not", "optimization_barrier", "or", "pow", "real", "reduce_precision", "rem", "round"),
        *("rsqrt", "select_n", "sharding_constraint", "reshard", "mesh_cast", "pvary", "pcast"),
        *("sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor"),
        *("acos", "acosh", "asin", "asinh", "atan", "atanh", "convert_element_type"),
        *("shift_left", "shift_right_logical", "shift_right_arithmetic", "to_edtype"),
    )
)
_PICKS = ("gather", "dynamic_slice")
_JOINS = (
    *("concatenate", "pad", "stack", "dynamic_update_slice", "scatter", "scatter-add"),
    *("scatter_add", "scatter_mul", "scatter_min", "scatter_max", "select_and_scatter_add"),
)
_RANKS = ("top_k", "approx_top_k", "argmax", "argmin", "sort")
_INDEX, _ONE_HOT = -1, -2
"""In place of a weight in the view of 0, 1, 2, …, and of what is 0 but where data equals it."""
_MOVES = ("convert_element_type", "broadcast_in_dim", "reshape", "transpose", "squeeze")
_WEIGHS = ("mul", "reduce_sum", "dot_general")
"""What leaves an index an index and a one-hot a selection, and what the latter alone."""
_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")


class Cell(NamedTuple):
    """A value of the computation, and what is known of it.

    Attributes:
        value: Array, or None if nothing is computed.
        views: Views of the weights that it holds.
        data: Whether it depends on the batch.
        sources: Weights whose products with data it comes from, with no such product in between.
        experts: Views of weights with copies, in which the dimensions that run over the copies
            are those of an activation that each copy gave; not `whole` where they may be outputs.
        index: Views of an index or of a one-hot, with the dimension that it counts.
    """

    value: Any = None
    views: tuple[View, ...] = ()
    data: bool = False
    sources: frozenset[int] = frozenset()
    experts: tuple[View, ...] = ()
    index: tuple[View, ...] = ()

    @property
    def is_weight(self) -> bool:
        """Whether it is a function of weights alone whose axes are known."""
        return bool(self.views) and not self.data


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of a weight with activations.

    Attributes:
        view: View of the weight's operand.
        roles: Role of each dimension of that operand: "inputs", "outputs" or "copies".
        kind: "dot", "ragged" or "conv".
        other: The activations: array, or None if nothing is computed.
        contracted: Dimensions of the weight's operand and of the other one that are summed over.
        batched: Dimensions of both that run over the same index.
        params: Parameters of the equation.
        groups: Group sizes of a ragged product.
        shape: Shape of the weight.
    """

    view: View
    roles: Mapping[int, str]
    kind: str
    other: Any
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batched: tuple[tuple[int, ...], tuple[int, ...]]
    params: Mapping[str, Any]
    groups: Any
    shape: tuple[int, ...]


Measure = Callable[[Product], Sums]


class Walk:
    """A walk; what it found is in its attributes.

    Attributes:
        uses: Roles of the axes by weight, each orientation once; None where an axis is in two.
        tentative: The same for products of two weights.
        looked_up: Weights that a lookup reads.
        copies: Axes over copies by weight, of weights that meet the activations elementwise.
        ranked: Weights whose products are ranked.
        opaque: Operation that cannot be followed, by weight.
        expert_axes: Axis over experts that all get the same activations, by weight.
        members: Axis over members that all get the same activations, by weight, where a product
            further on shows it. A walk that is given it takes the axis for copies.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        measure: Measure | None = None,
        members: Mapping[int, int] | None = None,
    ):
        self.shapes = shapes
        self.measure = measure
        self.uses: dict[int, list[Any]] = {}
        self.tentative: dict[int, list[Any]] = {}
        self.looked_up: set[int] = set()
        self.copies: dict[int, set[int]] = {}
        self.ranked: set[int] = set()
        self.opaque: dict[int, str] = {}
        self.expert_axes: dict[int, int] = {}
        self.members: dict[int, int] = dict(members or {})
        self._sums: Sums = {}
        self._depth = 0

    def run(self, closed: Any, cells: Sequence[Cell]) -> tuple[list[Cell], Sums]:
        """Returns the results of a closed jaxpr, and the sums over its products.

        Args:
            closed: Closed jaxpr.
            cells: Its arguments.
        """
        outside, self._sums = self._sums, {}
        constants = [Cell(value if self.measure else None) for value in closed.consts]
        results = self._follow(closed.jaxpr, [*constants, *cells])
        inside, self._sums = self._sums, outside
        return results, inside

    def _follow(self, jaxpr: Any, cells: Sequence[Cell]) -> list[Cell]:
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], cells, strict=True))

        def read(atom: Any) -> Cell:
            if isinstance(atom, core.Literal):
                return Cell(atom.val if self.measure else None)
            return known[atom]

        for eqn in jaxpr.eqns:
            known |= zip(eqn.outvars, self._step(eqn, list(map(read, eqn.invars))), strict=True)
        return list(map(read, jaxpr.outvars))

    def _step(self, eqn: Any, cells: list[Cell]) -> list[Cell]:
        """Returns the results of one equation."""
        name = eqn.primitive.name
        if name in ("scan", "while", "cond"):
            return getattr(self, f"_{name}")(eqn, cells)
        # Calls of other functions are followed as if they were written here.
        if name in _CALLS:
            inner = next(eqn.params[param] for param in _INNER if param in eqn.params)
            return self._call(inner, cells)
        if any(hasattr(value, "eqns") or hasattr(value, "jaxpr") for value in eqn.params.values()):
            for cell in cells:
                self.opaque |= {view.leaf: name for view in cell.views}
        if name in _PRODUCTS:
            self._product(eqn, cells)
        if name in _RANKS:
            self.ranked |= {
                leaf for cell in cells if len(cell.sources) == 1 for leaf in cell.sources
            }
        # Compute the values, then say what they are.
        outputs: Sequence[Any] = [None] * len(eqn.outvars)
        if self.measure:
            params = eqn.primitive.get_bind_params(eqn.params)
            result = eqn.primitive.bind(*(cell.value for cell in cells), **params)
            outputs = result if eqn.primitive.multiple_results else [result]
        data = any(cell.data for cell in cells)
        sources = frozenset().union(*(cell.sources for cell in cells))
        if name in _PRODUCTS:
            leaves = [view.leaf for cell in cells if cell.is_weight for view in cell.views]
            sources = frozenset(leaves) if leaves and data else sources
        picks = name in _PICKS or _chooses(eqn, cells) or _picks_matrices(eqn, cells)
        found = [
            self._views(eqn, cells, getattr(var.aval, "shape", ()), number, picks)
            for number, var in enumerate(eqn.outvars)
        ]
        if picks and any(found):
            data = name in _PICKS and cells[0].data  # a weight that the data picks is a weight
        experts = self._experts(eqn, cells, found)
        index = self._index(eqn, cells)
        return [
            Cell(value, held, data, sources, experts, index)
            for value, held in zip(outputs, found, strict=True)
        ]

    def _experts(self, eqn: Any, cells: list[Cell], found: list[Any]) -> tuple[View, ...]:
        """Returns the dimensions of an activation that run over the copies of a weight."""
        name = eqn.primitive.name
        if name == "gather" or (not any(c.experts for c in cells) and name != "dot_general"):
            return ()
        shape = getattr(eqn.outvars[0].aval, "shape", ())
        moved = []
        for at, cell in enumerate(cells):
            given = cell.experts
            if name == "dot_general" and cell.is_weight and not any(found):
                # Only the copies of the weight remain; its outputs are new to the activation.
                batched = _dot_sides(eqn.params["dimension_numbers"], at)[1]
                for view in cell.views:
                    over = [
                        i in batched or self._over(view, dim) for i, dim in enumerate(view.dims)
                    ]
                    shown = any(over)
                    if not shown:
                        every = range(len(over))
                        first = _first_axis(view, self.shapes[view.leaf], every)
                        over = [i == first for i in every]
                    dims = [dim if here else () for dim, here in zip(view.dims, over, strict=True)]
                    given += (view.with_dims(dims, whole=shown),)
            for view in given:
                result = self._view(eqn, cells, at, view, eqn.invars[at].aval.shape, shape)
                if result is not None and result.wide:
                    moved.append(dataclasses.replace(result, inner=(), whole=view.whole))
        return tuple(dict.fromkeys(moved))

    def _index(self, eqn: Any, cells: list[Cell]) -> tuple[View, ...]:
        """Returns the dimensions of a value that count 0, 1, 2, …, or that a one-hot has."""
        name, shape = eqn.primitive.name, getattr(eqn.outvars[0].aval, "shape", ())
        if name == "iota":
            counted = Piece(0, eqn.params["shape"][eqn.params["dimension"]], 1)
            dims = [(counted,) if at == eqn.params["dimension"] else () for at in range(len(shape))]
            return (View(_INDEX, tuple(dims)),)
        moved = []
        for at, cell in enumerate(cells):
            for view in cell.index:
                compared = name == "eq" and view.leaf == _INDEX and cells[1 - at].data
                weighed = name in _WEIGHS and view.leaf == _ONE_HOT
                if compared or weighed or name in _MOVES:
                    result = self._view(eqn, cells, at, view, eqn.invars[at].aval.shape, shape)
                    if result is not None and result.wide:
                        leaf = _ONE_HOT if compared else view.leaf
                        moved.append(dataclasses.replace(result, leaf=leaf, whole=True))
        return tuple(moved)

    def _call(self, inner: Any, cells: list[Cell]) -> list[Cell]:
        closed = inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())
        results, sums = self.run(closed, cells)
        self._add(sums)
        return results

    def _add(self, sums: Sums) -> None:
        for key, value in sums.items():
            self._sums[key] = (
                jax.tree.map(jnp.add, self._sums[key], value) if key in self._sums else value
            )

    # Views: what becomes of the axes of the weights.

    def _views(
        self, eqn: Any, cells: list[Cell], shape: tuple[int, ...], number: int, picks: bool
    ) -> tuple[View, ...]:
        """Returns the views of one of the results, of the equation's operands that are weights."""
        by_data = any(cell.data for cell in cells) and eqn.primitive.name not in _PICKS
        if by_data and not picks:
            # Activations, whatever they are made of.
            for view in (view for cell in cells for view in cell.views):
                pieces = (*(piece for _, piece in view.scanned), *view.picked)
                self.copies.setdefault(view.leaf, set()).update(piece.axis for piece in pieces)
            if eqn.primitive.name not in (*_ELEMENTWISE, *_PRODUCTS, *_JOINS, *_CALLS):
                for view in (view for cell in cells for view in cell.views if cell.is_weight):
                    self.opaque.setdefault(view.leaf, eqn.primitive.name)
            return ()
        found = []
        for at, cell in enumerate(cells):
            old = eqn.invars[at].aval.shape
            for view in cell.views:
                result = self._view(eqn, cells, at, view, old, shape, number)
                if result is not None and by_data:
                    result = _picked(eqn, at, view, result)
                if result is not None:
                    found.append(result)
        return _distinct(found)

    def _view(
        self,
        eqn: Any,
        cells: list[Cell],
        at: int,
        view: View,
        old: tuple[int, ...],
        new: tuple[int, ...],
        number: int = 0,
    ) -> View | None:
        name, params = eqn.primitive.name, eqn.params
        if name == "transpose":
            return views.transposed(view, params["permutation"])
        if name == "reshape":
            result = views.reshaped(view, old, new)
            if result is None and not any(cell.data for cell in cells):
                return view.with_dims([()] * len(new), whole=False)  # a product cannot be told
            return result
        if name == "broadcast_in_dim":
            return views.broadcast(view, new, old, params["broadcast_dimensions"])
        if name == "squeeze":
            return views.squeezed(view, params["dimensions"])
        if name == "expand_dims":
            return views.reshaped(view, old, new)
        if name == "slice":
            return views.sliced(view, old, new, params["start_indices"])
        if name == "split":
            starts = [0] * len(old)
            starts[params["axis"]] = sum(params["sizes"][:number])
            return views.sliced(view, old, new, starts)
        if name == "unstack":  # a slice at each position, without the axis
            axis = params["axis"]
            starts = [0] * len(old)
            starts[axis] = number
            one = [1 if at == axis else size for at, size in enumerate(old)]
            return views.squeezed(views.sliced(view, old, one, starts), [axis])
        if name == "dynamic_slice" and at == 0:
            return views.sliced(view, old, new, [cell.value for cell in cells[1 : 1 + len(old)]])
        if name == "gather" and at == 0:
            return self._gathered(eqn, cells, view, old)
        if name in ("concatenate", "pad", "rev"):
            # The roles stay known. The place within the joined dimension does not, which its size
            # says where it runs over an axis of the weight.
            alone = any(
                a != b and not view.dims[at] for at, (a, b) in enumerate(zip(old, new, strict=True))
            )
            return dataclasses.replace(view, whole=view.whole and name != "rev" and not alone)
        if name == "stack":
            dims = list(view.dims)
            dims.insert(params["axis"], ())
            return view.with_dims(dims, whole=False)
        if name == "dot_general":
            return _of_product(eqn, cells, at, view)
        if name in ("reduce_sum", "reduce_max", "reduce_min") and eqn.outvars[0].aval.shape != old:
            if any(cell.data for cell in cells):
                return views.squeezed(view, params["axes"])
            return None  # a statistic of the weight, such as its norm
        if (name.startswith("reduce_") and "axes" in params) or name in _RANKS:
            return None
        if name in _ELEMENTWISE or name == "tile":
            return views.broadcast(view, new, old, range(len(old)))
        if old and new and not any(cell.data for cell in cells):
            self.opaque.setdefault(view.leaf, name)
        return None

    def _gathered(
        self, eqn: Any, cells: list[Cell], view: View, old: tuple[int, ...]
    ) -> View | None:
        """Returns the view of the matrices that are looked up, or None for a lookup of vectors."""
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        kept = [
            axis
            for axis in range(len(old))
            if axis not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        ]
        wide = [axis for axis in kept if view.dims[axis] and sizes[axis] == old[axis] > 1]
        if len(wide) < 2 or numbers.operand_batching_dims:
            self.looked_up.add(view.leaf)
            return None
        out_ndim = eqn.outvars[0].aval.ndim
        dims: list[views.Dim] = [()] * out_ndim
        for axis, position in zip(kept, numbers.offset_dims, strict=True):
            dims[position] = view.dims[axis] if sizes[axis] == old[axis] else ()
        # A copy for each index; a single index is known where it has one element.
        indices = cells[1].value
        single = math.prod(eqn.invars[1].aval.shape) == 1
        place = indices.reshape(()) if single and indices is not None else None
        pieces = [piece for axis in numbers.start_index_map for piece in view.dims[axis]]
        picked, places = (*view.picked, *pieces), (*view.places, *(place for _ in pieces))
        return view.with_dims(dims, picked=picked, places=places, whole=view.whole and single)

    # Products: where a weight meets the activations.

    def _product(self, eqn: Any, cells: list[Cell]) -> None:
        name = eqn.primitive.name
        groups = None
        if name == "conv_general_dilated":
            sides = [_conv_sides(eqn, side) for side in (0, 1)]
            kind = "conv"
        elif name == "ragged_dot_general":
            ragged = eqn.params["ragged_dot_dimension_numbers"]
            sides = [_dot_sides(ragged.dot_dimension_numbers, side) for side in (0, 1)]
            # The groups of the weight are its copies.
            sides[1] = (sides[1][0], (*sides[1][1], *ragged.rhs_group_dimensions))
            kind, groups = "ragged", cells[2].value
        else:
            sides = [_dot_sides(eqn.params["dimension_numbers"], side) for side in (0, 1)]
            kind = "dot"
        for side in (0, 1):
            cell, other = cells[side], cells[1 - side]
            if not cell.is_weight:
                continue
            (contracted, batched), (their, theirs) = sides[side], sides[1 - side]
            for view in cell.views:
                roles = _dims_roles(len(view.dims), contracted, batched)
                roles |= self._over_experts(view, other, contracted, their)
                if kind == "dot":
                    self._find_members(view, other, batched, theirs)
                    roles |= self._expert_axis(view, roles)
                    hot = _by_one_hot(view, other, contracted, their)
                    if any(view.dims[at] and at not in hot for at in contracted):
                        roles |= dict.fromkeys(hot, "copies")
                    elif hot and _picks_matrices(eqn, cells):
                        continue
                    elif hot:
                        self.looked_up.add(view.leaf)
                # Repeated over the inputs it is a scale, not a kernel.
                sizes = eqn.invars[side].aval.shape
                repeated = any(sizes[at] > 1 and not view.dims[at] for at in contracted)
                found = views.roles(view, self.shapes[view.leaf], roles, repeated)
                both = other.is_weight and not other.data
                noted = (self.tentative if both else self.uses).setdefault(view.leaf, [])
                if found not in noted:
                    noted.append(found)
                if self.measure and not both:
                    exact = all(
                        roles[at] == "outputs" or not dim or _size(dim) == sizes[at]
                        for at, dim in enumerate(view.dims)
                    )
                    whole = view.whole and exact and found is not None
                    whole = whole and _covers(view, roles, self.shapes[view.leaf])
                    product = Product(
                        view=dataclasses.replace(view, whole=whole),
                        roles=roles,
                        kind=kind,
                        other=other.value,
                        contracted=(contracted, their),
                        batched=(batched, theirs),
                        params=eqn.params,
                        groups=groups,
                        shape=self.shapes[view.leaf],
                    )
                    self._add(self.measure(product))

    def _expert_axis(self, view: View, roles: Mapping[int, str]) -> dict[int, str]:
        """Returns the dimension over experts that all get the same activations, as copies.

        To a product the first axis of a weight (experts, in, out) is one more output. It is one
        over experts where a router before it ranks as many outputs.
        """
        free = [at for at, role in roles.items() if role != "copies"]
        first = _first_axis(view, self.shapes[view.leaf], free)
        if first is None or roles[first] != "outputs":
            return {}
        ((axis, size, _),) = view.dims[first]
        if self.members.get(view.leaf) != axis and size not in self._routed():
            return {}
        self.expert_axes[view.leaf] = axis
        return {first: "copies"}

    def _find_members(
        self, view: View, other: Cell, batched: Sequence[int], theirs: Sequence[int]
    ) -> None:
        """Notes the weights before, of which this one's copies take one part of the result each.

        So it is in an ensemble under `vmap`, whose first weights all get the same activations.
        """
        for own, at in zip(batched, theirs, strict=True):
            for before in other.experts if view.dims[own] else ():
                if before.dims[at] and not before.whole:
                    self.members[before.leaf] = before.dims[at][0].axis

    def _routed(self) -> set[int]:
        """Returns the numbers of outputs of the routers that were seen."""
        return {
            math.prod(self.shapes[leaf][axis] for axis in use["outputs"])
            for leaf in self.ranked
            for use in self.uses.get(leaf, [])
            if use is not None
        }

    def _over(self, view: View, dim: views.Dim) -> bool:
        return any(piece.axis == self.expert_axes.get(view.leaf, -1) for piece in dim)

    def _over_experts(
        self, view: View, other: Cell, contracted: Sequence[int], their: Sequence[int]
    ) -> dict[int, str]:
        """Returns the dimensions that a mixture of experts sums over together with the inputs."""
        if not self.ranked or len(contracted) < 2:
            return {}
        found = {}
        for own, at in zip(contracted, their, strict=True):
            size = math.prod(piece.size for piece in view.dims[own])
            if any(
                expert.whole
                and expert.dims[at]
                and math.prod(piece.size for piece in expert.dims[at]) == size
                for expert in other.experts
            ):
                found[own] = "copies"
        return found

    # Control flow: scans, loops and branches, with the sums carried out of them.

    def _scan(self, eqn: Any, cells: list[Cell]) -> list[Cell]:
        params, body = eqn.params, eqn.params["jaxpr"]
        consts, carried = _scan_counts(params)
        fixed, start = cells[:consts], cells[consts : consts + carried]
        rows = cells[consts + carried :]
        self._depth += 1
        depth = self._depth
        inside = [
            cell._replace(
                value=None,
                views=tuple(views.enter_scan(v, depth) for v in cell.views),
                experts=(),
                index=(),
            )
            for cell in rows
        ]
        known = self._settle(
            lambda start: self._without_values(body, [*fixed, *start, *inside]), start, carried
        )
        if self.measure is None:
            results, _ = self.run(body, [*fixed, *known, *inside])
            sums: Sums = {}
        else:
            results, sums = self._scan_values(params, fixed, start, known, rows, inside, depth)
        self._depth -= 1
        self._add(sums)
        return [
            # Stacked over the iterations, a weight in it is not followed any further.
            cell if at < carried else cell._replace(views=(), experts=(), index=())
            for at, cell in enumerate(results)
        ]

    def _scan_values(
        self,
        params: Mapping[str, Any],
        fixed: list[Cell],
        start: list[Cell],
        known: list[Cell],
        rows: list[Cell],
        inside: list[Cell],
        depth: int,
    ) -> tuple[list[Cell], Sums]:
        infos: list[Cell] = []
        _, carried = _scan_counts(params)

        def iteration(carry: Any, row: Any) -> Any:
            cells = [
                *fixed,
                *(cell._replace(value=v) for cell, v in zip(known, carry, strict=True)),
                *(cell._replace(value=v) for cell, v in zip(inside, row, strict=True)),
            ]
            results, sums = self.run(params["jaxpr"], cells)
            infos[:] = [cell._replace(value=None) for cell in results]
            values = [cell.value for cell in results]
            # The sums of a weight that the scan runs over are stacked, the others are added up.
            stacked = {k: v for k, v in sums.items() if _level(k) == depth}
            added = {k: v for k, v in sums.items() if _level(k) != depth}
            return values[:carried], values[carried:], stacked, added

        carry = [cell.value for cell in start]
        xs = [cell.value for cell in rows]
        first = jax.tree.map(lambda x: x[0], xs)
        total = _zeros(jax.eval_shape(iteration, carry, first)[3])

        def step(state: Any, row: Any) -> Any:
            carry, total = state
            carry, ys, stacked, added = iteration(carry, row)
            return (carry, jax.tree.map(jnp.add, total, added)), (ys, stacked)

        (carry, total), (ys, stacked) = jax.lax.scan(
            step, (carry, total), xs, params["length"], reverse=params["reverse"]
        )
        sums = {_left_scan(key): _unmerged(key, value) for key, value in stacked.items()} | total
        values = [*carry, *ys]
        return [info._replace(value=v) for info, v in zip(infos, values, strict=True)], sums

    def _while(self, eqn: Any, cells: list[Cell]) -> list[Cell]:
        params = eqn.params
        a, b = params["cond_nconsts"], params["body_nconsts"]
        test, fixed, start = cells[:a], cells[a : a + b], cells[a + b :]
        known = self._settle(
            lambda start: self._without_values(params["body_jaxpr"], [*fixed, *start]),
            start,
            len(start),
        )
        if self.measure is None:
            self.run(params["cond_jaxpr"], [*test, *known])
            results, _ = self.run(params["body_jaxpr"], [*fixed, *known])
            return results
        infos: list[Cell] = []

        def iteration(carry: Any) -> tuple[list[Any], Sums]:
            given = [cell._replace(value=v) for cell, v in zip(known, carry, strict=True)]
            results, sums = self.run(params["body_jaxpr"], [*fixed, *given])
            infos[:] = [cell._replace(value=None) for cell in results]
            return [cell.value for cell in results], sums

        def more(state: Any) -> Any:
            given = [cell._replace(value=v) for cell, v in zip(known, state[0], strict=True)]
            return self.run(params["cond_jaxpr"], [*test, *given])[0][0].value

        def step(state: Any) -> Any:
            carry, sums = iteration(state[0])
            return carry, jax.tree.map(jnp.add, state[1], sums)

        carry = [cell.value for cell in start]
        total = _zeros(jax.eval_shape(iteration, carry)[1])
        carry, total = jax.lax.while_loop(more, step, (carry, total))
        self._add(total)
        return [info._replace(value=v) for info, v in zip(infos, carry, strict=True)]

    def _cond(self, eqn: Any, cells: list[Cell]) -> list[Cell]:
        chosen, *cells = cells
        branches = eqn.params["branches"]
        runs = [self._without_values(branch, cells) for branch in branches]
        merged = [
            Cell(
                None,
                _distinct([view for cell in some for view in cell.views]),
                chosen.data or any(cell.data for cell in some),
                frozenset().union(*(cell.sources for cell in some)),
            )
            for some in zip(*runs, strict=True)
        ]
        merged = [cell._replace(views=()) if cell.data else cell for cell in merged]
        if self.measure is None:
            return merged
        operands = [cell.value for cell in cells]

        def taken(branch: Any) -> Callable[..., tuple[list[Any], Sums]]:
            def run(*operands: Any) -> tuple[list[Any], Sums]:
                given = [c._replace(value=v) for c, v in zip(cells, operands, strict=True)]
                results, sums = self.run(branch, given)
                return [cell.value for cell in results], sums

            return run

        # Every branch returns the sums of all; those of the others are 0.
        shapes: Sums = {}
        for branch in branches:
            shapes |= jax.eval_shape(taken(branch), *operands)[1]

        def filled(branch: Any) -> Callable[..., tuple[list[Any], Sums]]:
            def run(*operands: Any) -> tuple[list[Any], Sums]:
                values, sums = taken(branch)(*operands)
                return values, _zeros(shapes) | sums

            return run

        values, sums = jax.lax.switch(chosen.value, [filled(b) for b in branches], *operands)
        self._add(sums)
        return [cell._replace(value=v) for cell, v in zip(merged, values, strict=True)]

    def _without_values(self, closed: Any, cells: Sequence[Cell]) -> list[Cell]:
        measure, self.measure = self.measure, None
        results, _ = self.run(closed, [cell._replace(value=None) for cell in cells])
        self.measure = measure
        return results

    def _noted(self, again: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns a copy of all that was found, or goes back to it."""
        if again is not None:
            self.__dict__ |= copy.deepcopy(again)
        names = ("uses", "tentative", "looked_up", "copies", "ranked", "opaque")
        names += ("expert_axes", "members")
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    def _settle(
        self, body: Callable[[list[Cell]], list[Cell]], start: list[Cell], carried: int
    ) -> list[Cell]:
        """Returns what is known of a carry in every iteration."""
        known = [cell._replace(value=None) for cell in start]
        noted = self._noted()
        while True:
            after = body(known)[:carried]
            # What was seen before it is known what the carry is may not be so.
            self._noted(noted)
            for a, b in zip(known, after, strict=True):
                if a.views != b.views and not b.data:
                    # Another part of the weight, or another orientation, in every iteration.
                    noted["opaque"] |= {view.leaf: "a loop" for view in a.views}
            merged = [
                Cell(
                    None,
                    a.views if a.views == b.views and not b.data else (),
                    a.data or b.data,
                    a.sources | b.sources,
                    a.experts if a.experts == b.experts else (),
                )
                for a, b in zip(known, after, strict=True)
            ]
            if merged == known:
                return known
            known = merged


def _covers(view: View, roles: Mapping[int, str], shape: Sequence[int]) -> bool:
    """Returns whether a product runs over the whole of every axis of inputs and of copies."""
    sizes: dict[int, int] = {}
    pieces = [piece for at, dim in enumerate(view.dims) if roles[at] != "outputs" for piece in dim]
    for piece in (*pieces, *(piece for _, piece in view.scanned), *view.picked):
        sizes[piece.axis] = sizes.get(piece.axis, 1) * piece.size
    return all(size == shape[axis] for axis, size in sizes.items())


def _first_axis(view: View, shape: Sequence[int], free: Sequence[int]) -> int | None:
    """Returns the dimension that runs over the first of three free axes alone, or None."""
    named = [at for at in free if view.dims[at]]
    if len(named) != 3:
        return None
    first = min(named, key=lambda at: view.dims[at][0].axis)
    piece = view.dims[first][0]
    alone = len(view.dims[first]) == 1 and piece.size == shape[piece.axis]
    return first if alone else None


def _size(dim: views.Dim) -> int:
    return math.prod(piece.size for piece in dim)


def _distinct(found: Sequence[View]) -> tuple[View, ...]:
    """Returns every view once, as where a weight is multiplied with a function of itself."""
    known = {}
    for view in found:
        places = tuple(at if isinstance(at, int) else id(at) for at in view.places)
        known.setdefault((view, places), view)
    return tuple(known.values())


def _scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the numbers of constants and of carried values of a scan."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    # From jax 0.12 on, the arguments are grouped in a tree instead.
    consts, carried, _ = (len(list(group)) for group in params["ft_in"].unpack())
    return consts, carried


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


class SumKey(NamedTuple):
    """What a sum belongs to.

    Attributes:
        leaf: Index of the weight.
        labels: Pieces of the weight's axes over which the leading axes of the sum run.
        scanned: (depth, piece) of the scans that the sum has not left yet, outermost first.
        rest: What else tells sums apart that cannot be added.
    """

    leaf: int
    labels: tuple[Piece, ...]
    scanned: tuple[tuple[int, Piece], ...]
    rest: Any = ()


def _level(key: SumKey) -> int:
    return key.scanned[-1][0] if key.scanned else 0


def _left_scan(key: SumKey) -> SumKey:
    depth = _level(key)
    pieces = tuple(piece for at, piece in key.scanned if at == depth)
    outer = tuple((at, piece) for at, piece in key.scanned if at != depth)
    return SumKey(key.leaf, (*pieces, *key.labels), outer, key.rest)


def _unmerged(key: SumKey, value: Any) -> Any:
    """Returns sums that a scan stacked, with an axis for each piece that it runs over."""
    sizes = [piece.size for at, piece in key.scanned if at == _level(key)]
    return jax.tree.map(lambda leaf: leaf.reshape(*sizes, *leaf.shape[1:]), value)


def _dot_sides(numbers: Any, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    contracted, batched = numbers
    return tuple(contracted[side]), tuple(batched[side])


def _conv_sides(eqn: Any, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the summed and the shared dimensions of an operand of a convolution."""
    spec = eqn.params["dimension_numbers"]
    if side == 1:
        return tuple(spec.rhs_spec[1:]), ()
    return (spec.lhs_spec[1], *spec.lhs_spec[2:]), ()


def _dims_roles(ndim: int, contracted: Sequence[int], batched: Sequence[int]) -> dict[int, str]:
    return {
        at: "inputs" if at in contracted else "copies" if at in batched else "outputs"
        for at in range(ndim)
    }


def _by_one_hot(
    view: View, other: Cell, contracted: Sequence[int], their: Sequence[int]
) -> list[int]:
    """Returns the dimensions of a weight that a product sums over with a one-hot."""
    hot = [one for one in other.index if one.leaf == _ONE_HOT]
    pairs = zip(contracted, their, strict=True)
    return [own for own, at in pairs if view.dims[own] and any(one.dims[at] for one in hot)]


def _chooses(eqn: Any, cells: list[Cell]) -> bool:
    """Returns whether data chooses between weights, as a switch under `vmap` does."""
    chosen = eqn.primitive.name == "select_n" and cells[0].data
    return chosen and not any(cell.data for cell in cells[1:])


def _picks_matrices(eqn: Any, cells: list[Cell]) -> bool:
    """Returns whether a product with a one-hot picks matrices out of a stack of them."""
    if eqn.primitive.name != "dot_general":
        return False
    for at, (cell, other) in enumerate(zip(cells, reversed(cells), strict=True)):
        summed, _ = _dot_sides(eqn.params["dimension_numbers"], at)
        their, _ = _dot_sides(eqn.params["dimension_numbers"], 1 - at)
        for view in cell.views if cell.is_weight and other.data else ():
            rest = view.with_dims([dim for d, dim in enumerate(view.dims) if d not in summed])
            named = [d for d in summed if view.dims[d]]
            if named and named == _by_one_hot(view, other, summed, their) and rest.wide >= 2:
                return True
    return False


def _picked(eqn: Any, at: int, view: View, result: View) -> View:
    """Returns the view of a weight of which data has picked copies or chosen values."""
    pieces: list[Piece] = []
    if eqn.primitive.name == "dot_general":
        summed, _ = _dot_sides(eqn.params["dimension_numbers"], at)
        pieces = [piece for d in summed for piece in view.dims[d]]
    return dataclasses.replace(
        result,
        picked=(*result.picked, *pieces),
        places=(*result.places, *(None for _ in pieces)),
        inner=view.inner,
        whole=False,
    )


def _of_product(eqn: Any, cells: list[Cell], at: int, view: View) -> View | None:
    """Returns the view of a weight in its product with another weight, as in LoRA."""
    (contracted, batched) = _dot_sides(eqn.params["dimension_numbers"], at)
    (_, others) = _dot_sides(eqn.params["dimension_numbers"], 1 - at)
    other_ndim = eqn.invars[1 - at].aval.ndim
    free = [d for d in range(len(view.dims)) if d not in (*contracted, *batched)]
    theirs = other_ndim - len(contracted) - len(others)
    own, blank = [view.dims[d] for d in free], [()] * theirs
    dims = [view.dims[d] for d in batched] + (own + blank if at == 0 else blank + own)
    inner = view.inner + tuple(piece.axis for d in contracted for piece in view.dims[d])
    return view.with_dims(dims, inner=inner, whole=False)
