"""What cells ask for that cannot be done, found before any training."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from swe_prune import allocation, blockwise, importance, masks, patterns, tree
from swe_prune.errors import InputError, did_you_mean
from swe_prune.study import grid

BLOCKWISE_OPTIONS = ("block", "damping")


def check(cells: list[grid.Cell], abstract_params: PyTree, prunable: PyTree) -> None:
    """Checks names, needs and shapes of every cell.

    Args:
        cells: of the study.
        abstract_params: shapes and dtypes of the parameters.
        prunable: bool pytree like them.

    Raises:
        InputError: the first cell that cannot work, by its name, with the mend.
    """
    fits = functools.cache(functools.partial(_check_fits, abstract_params, prunable))
    for cell in cells:
        try:
            _check_blockwise(cell) if cell.blockwise is not None else _check_criterion(cell)
            if cell.allocation is not None:
                allocation.get(cell.allocation).check_options(())
            n_of_m = cell.pattern is not None and patterns.is_n_of_m(cell.pattern)
            if n_of_m and (cell.gradual or cell.allocation is not None):
                raise InputError(
                    f"pattern {cell.pattern!r} fixes the sparsity of every tensor; give schedule "
                    "'one-shot' and no allocation"
                )
            if cell.rule != "std":
                fits(cell.rule, cell.pattern, cell.requested)
        except InputError as error:
            raise InputError(f"cell {cell.name!r}: {error}") from error


def _check_criterion(cell: grid.Cell) -> None:
    criterion = importance.get(cell.criterion)
    criterion.check_options(name for name, _ in cell.options)
    for name, value in cell.options:
        if not isinstance(value, int | float | str | None):
            raise InputError(f"option {name} = {value!r} is no number or name; give one")
    if "learned" in criterion.needs:
        raise InputError(
            f"criterion {cell.criterion!r} needs scores that movement pruning learned, which a "
            "study does not; choose another"
        )


def _check_blockwise(cell: grid.Cell) -> None:
    if cell.blockwise not in blockwise.METHODS:
        raise InputError(
            f"unknown method {cell.blockwise!r} of {grid.BLOCKWISE!r}; "
            f"{did_you_mean(str(cell.blockwise), blockwise.METHODS)}"
        )
    for name, _ in cell.options:
        if name not in BLOCKWISE_OPTIONS:
            raise InputError(
                f"criterion {cell.criterion!r} has no option {name!r}; its options: "
                + ", ".join(BLOCKWISE_OPTIONS)
            )
    if cell.rule != "tensor" or cell.gradual:
        raise InputError(
            f"criterion {cell.criterion!r} prunes kernel by kernel and at once; give scope "
            "'tensor' and schedule 'one-shot'"
        )
    if cell.pattern is not None and not patterns.is_n_of_m(cell.pattern):
        raise InputError(
            f"criterion {cell.criterion!r} knows no pattern {cell.pattern!r}; give None or 'n:m'"
        )


def _check_fits(
    abstract_params: PyTree, prunable: PyTree, rule: str, pattern: str | None, sparsity: float
) -> None:
    """Traces the selection, which finds what shapes and sparsities do not admit."""
    scores = tree.map_named(
        lambda _, leaf, chosen: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if chosen else None,
        abstract_params,
        prunable,
    )

    def select(scores: Any) -> Any:
        return masks.by_sparsity(scores, sparsity, scope=rule, pattern=pattern)

    jax.eval_shape(select, scores)
