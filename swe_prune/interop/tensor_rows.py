"""Rows of the tables of stored tensors: which parameters are in a tensor, and how it is laid out.

Layouts of stored tensors, whose parameters are kernels of inputs x outputs:

    as_is    vectors, and embeddings V x D
    out_in   torch's Linear: outputs x inputs
    in_out   GPT-2's Conv1D: inputs x outputs
"""

import dataclasses
from collections.abc import Callable

AS_IS, OUT_IN, IN_OUT = "as_is", "out_in", "in_out"


@dataclasses.dataclass(frozen=True)
class Row:
    """Names of a stored tensor and of the parameters in it.

    Attributes:
        stored: Name of the stored tensor, with `{i}` for the layer, `{v}` for the layer of a vision
            tower, and `{e}` if each index of the parameters' first axis, such as an expert, has a
            tensor of its own.
        params: Names of the parameters, in the order of the tensor's outputs.
        layout: Layout of the stored tensor: `AS_IS`, `OUT_IN` or `IN_OUT`.
        interleaved: Whether the two halves of each head are interleaved.
        by_head: Whether the parameters take turns head by head, instead of one after another.
        fold: Function from the shape by the layout to the shape in the file, which has the same
            numbers in the same order. If None, they are the same shape.
    """

    stored: str
    params: tuple[str, ...]
    layout: str = AS_IS
    interleaved: bool = False
    by_head: bool = False
    fold: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """All the tensors of one kind of file.

    Attributes:
        rows: Rows of the table; those with `{i}` apply to every layer.
        prefix: Prefix that is missing from the names in files of the bare model, without its head.
        ignored: Regular expressions for the names of tensors that hold no parameters.
    """

    rows: tuple[Row, ...]
    prefix: str = ""
    ignored: tuple[str, ...] = ()


def norm_rows(stored: str, ours: str) -> tuple[Row, ...]:
    """Returns the rows of a norm."""
    return (Row(f"{stored}.weight", (f"{ours}/scale",)), Row(f"{stored}.bias", (f"{ours}/bias",)))


def dense_rows(
    stored: str,
    *ours: str,
    layout: str = OUT_IN,
    interleaved: bool = False,
    by_head: bool = False,
) -> tuple[Row, ...]:
    """Returns the rows of a dense layer, or of several that are stored as one."""
    kernels = tuple(f"{name}/kernel" for name in ours)
    biases = tuple(f"{name}/bias" for name in ours)
    return (
        Row(f"{stored}.weight", kernels, layout, interleaved, by_head),
        Row(f"{stored}.bias", biases, interleaved=interleaved, by_head=by_head),
    )
