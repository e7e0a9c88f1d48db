"""Prefixes that wrappers put before the names of a model's tensors.

torch.compile stores `_orig_mod.model.norm.weight`, DistributedDataParallel `module.model.…`, peft
`base_model.model.model.…`, and a model of text and images `language_model.model.…`. Such a file is
read where the prefix is given; without it, the error names the prefix.
"""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from swe_prune.errors import InputError, listed
from swe_prune.interop.load_params import Entry, Source
from swe_prune.interop.tensor_rows import Table

WRAPPERS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "module.",
)
"""Prefixes that may also be inside of names, where a part of a model was wrapped."""


@dataclasses.dataclass(frozen=True)
class Unprefixed:
    """Tensors of a source under the names that follow a prefix; a `load_params.Source`.

    Attributes:
        source: Source that the tensors are read from.
        names: Name in the source of each tensor, by the name without prefix.
        entries: Shape and dtype of each tensor, by the name without prefix.
    """

    source: Source
    names: Mapping[str, str]
    entries: Mapping[str, Entry]

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """Yields a tensor that can be sliced."""
        with self.source.open(self.names[name]) as stored:
            yield stored


def without(source: Source, prefix: str | None, table: Table, where: str) -> Source:
    """Returns the tensors whose names begin with a prefix, under the rest of their names.

    An output head may be outside of the prefix, as in models of text and images. The prefixes
    `WRAPPERS` are removed wherever they are in a name.

    Args:
        source: Stored tensors of the model.
        prefix: Prefix of the names, such as "_orig_mod."; its last dot may be left out. None or
            "": the source as it is.
        table: Table of names for this kind of file.
        where: Description of the source for messages.

    Raises:
        InputError: If no name begins with the prefix.

    Warns:
        UserWarning: If there are tensors outside of the prefix, which are not read.
    """
    if not prefix:
        return source
    dotted = prefix if prefix.endswith(".") else f"{prefix}."
    if dotted in WRAPPERS:
        names = {_unwrapped(name, dotted): name for name in source.entries}
        theirs = [name for new, name in names.items() if new != name]
    else:
        theirs = [name for name in source.entries if name.startswith(prefix)]
        if all(name.startswith(dotted) for name in theirs):
            prefix = dotted
        names = {name.removeprefix(prefix): name for name in theirs}
    if not theirs:
        raise InputError(
            f"prefix {prefix!r} begins none of the names in {where}, which are "
            f"{listed(source.entries)}; correct it or leave it out"
        )
    tops = {row.stored for row in table.rows if not row.stored.startswith(table.prefix)}
    names = {name: name for name in tops if name in source.entries} | names
    read = set(names.values())
    outside = [name for name in source.entries if name not in read]
    if outside:
        warnings.warn(
            f"{where} has {listed(outside)} outside of the prefix {prefix!r}; not read",
            stacklevel=2,
        )
    entries = {name: source.entries[stored] for name, stored in names.items()}
    return Unprefixed(source, names, entries)


def check(source: Source, needed: Sequence[str], table: Table, where: str) -> None:
    """Raises InputError that names the prefix, if the tensors are there after one.

    Args:
        source: Stored tensors of the model.
        needed: Names of the tensors that the model needs.
        table: Table of names for this kind of file.
        where: Description of the source for the error.
    """
    bare = [name.removeprefix(table.prefix) for name in needed]
    if any(set(names) <= source.entries.keys() for names in (needed, bare)):
        return
    if any(".lora_A." in name for name in source.entries):
        raise InputError(
            f"{where} has adapters next to its weights; merge them first, by peft's "
            "merge_and_unload(), and save the model that it returns"
        )
    for wrapper in WRAPPERS:  # inside of names, where a part of the model was wrapped
        inside = [name for name in source.entries if f".{wrapper}" in name]
        clean = {_unwrapped(name, wrapper) for name in source.entries}
        if inside and len(set(needed) & clean) >= len(needed) - 1 > len(needed) / 2:
            raise InputError(
                f"{where} has {wrapper!r} in the names of this model's tensors, such as "
                f"{inside[0]!r}; give --prefix={wrapper} (prefix={wrapper!r} in Python)"
            )
    # Names as they are, or those of the bare model without its head.
    inner = [name.removeprefix(table.prefix) for name in needed if name.startswith(table.prefix)]
    for wanted, own in ((needed, ""), (inner, table.prefix)):
        found = _found(source.entries, set(wanted))
        most = max(map(len, found.values()), default=0)
        together = set().union(*found.values())
        if len(together) < len(wanted) / 2:
            continue
        best = [prefix for prefix, names in found.items() if len(names) == most]
        if most < len(together) - 1:  # not even all but a head
            raise InputError(
                f"{where} has names of this model's tensors after several prefixes, "
                f"{listed(sorted(found))} ('' is none), which one --prefix cannot read; save the "
                "weights again under one"
            )
        if own in best:  # the names are as they should be
            continue
        shown = " or ".join(f"--prefix={prefix}" for prefix in best)
        raise InputError(
            f"{where} has the names of this model's tensors after the prefix "
            f"{' or '.join(map(repr, best))}; give {shown} (prefix={best[0]!r} in Python)"
        )


def _unwrapped(name: str, wrapper: str) -> str:
    """Returns a name without a wrapper's prefix, at its beginning or inside.

    >>> _unwrapped("_orig_mod.model._orig_mod.norm.weight", "_orig_mod.")
    'model.norm.weight'
    """
    return re.sub(rf"(^|\.)({re.escape(wrapper)})+", r"\1", name)


def _found(names: Mapping[str, Any], needed: set[str]) -> dict[str, set[str]]:
    """Returns the needed names that are there after each prefix; "" is one of them."""
    found: dict[str, set[str]] = {}
    for name in names:
        for start in (0, *(match.end() for match in re.finditer(r"[^A-Za-z0-9_]", name))):
            if name[start:] in needed:
                found.setdefault(name[:start], set()).add(name[start:])
                break
    return found
