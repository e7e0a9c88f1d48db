"""Names of the primitives that a walk tells apart, and readers of their equations."""

from collections.abc import Mapping
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CALLS = _names(
    """
    checkpoint closed_call core_call core_closed_call custom_jvp_call custom_lin custom_vjp_call
    custom_vjp_call_jaxpr jit named_call pjit remat remat2
    """
)
"""Calls of other functions, which are followed as if they were written in place."""
INNER = ("call_jaxpr", "jaxpr", "fun_jaxpr")
"""Parameters of a call that may hold its jaxpr, in the order in which they are looked for."""
ELEMENTWISE = _names(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp complex conj
    convert_element_type copy copy_p cos cosh device_put digamma div eq erf erf_inv erfc exp exp2
    expm1 floor ge gt imag integer_pow is_finite le lgamma log log1p logistic lt max mesh_cast min
    mul name ne neg nextafter not optimization_barrier or pcast pow pvary real reduce_precision
    rem reshard round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh to_edtype xor
    """
)
PICKS = _names("dynamic_slice gather")
JOINS = _names(
    """
    concatenate dynamic_update_slice pad scatter scatter-add scatter_add scatter_max scatter_min
    scatter_mul select_and_scatter_add stack
    """
)
RANKS = _names("approx_top_k argmax argmin sort top_k")
PRODUCTS = _names("conv_general_dilated dot_general ragged_dot_general")


def dot_sides(numbers: Any, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the summed and the shared dimensions of an operand of a dot product."""
    contracted, batched = numbers
    return tuple(contracted[side]), tuple(batched[side])


def conv_sides(eqn: Any, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the summed and the shared dimensions of an operand of a convolution."""
    spec = eqn.params["dimension_numbers"]
    if side == 1:
        return tuple(spec.rhs_spec[1:]), ()
    return (spec.lhs_spec[1], *spec.lhs_spec[2:]), ()


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the numbers of constants and of carried values of a scan."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    # From jax 0.12 on, the arguments are grouped in a tree instead.
    consts, carried, _ = (len(list(group)) for group in params["ft_in"].unpack())
    return consts, carried
