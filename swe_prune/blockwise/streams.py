"""The activations of the calibration batches between two blocks, as several models have them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from swe_prune.blockwise import block_graph, guard
from swe_prune.blockwise.runner import Runner, variables_with

TARGETS = ("pruned_inputs", "dense_inputs", "dense_outputs")
"""What restoring aims at: the dense kernel's outputs on the inputs that the pruned blocks before
give; the same on the inputs of the dense model; the outputs that the dense model has in their
place, on the inputs that the pruned blocks give."""


@dataclasses.dataclass
class Streams:
    """Activations of all batches, of which the last `held_out` judge what is restored.

    Attributes:
        pruned: What the result's blocks give.
        dense: What the dense model's give; None of a batch where nobody asks.
        alone: What the masks alone give, of the batches that are held out.
        counts: Number of sequences of each batch.
        held_out: Number of last batches that judge.
    """

    pruned: list[block_graph.Activations]
    dense: list[block_graph.Activations | None]
    alone: list[block_graph.Activations]
    counts: list[int]
    held_out: int

    @classmethod
    def of(
        cls,
        states: list[block_graph.Activations],
        counts: list[int],
        held_out: int,
        everywhere: bool,
    ) -> "Streams":
        """Returns the streams, which all begin with the same activations.

        Args:
            states: Activations of all batches.
            counts: Number of sequences of each batch.
            held_out: Number of last batches that judge.
            everywhere: Whether what the dense model gives is needed of the other batches too.
        """
        used = len(states) - held_out
        dense = [state if everywhere or at >= used else None for at, state in enumerate(states)]
        return cls(list(states), dense, states[used:], counts, held_out)

    @property
    def used(self) -> int:
        """Number of batches that calibrate."""
        return len(self.pruned) - self.held_out

    def sums(self, runner: Runner, part: Any, target: str) -> tuple[dict[str, Any], int]:
        """Returns the sums of a block's kernels over the batches that calibrate, and sequences."""
        used, counts = self.used, self.counts[: self.used]
        some: Sequence[Any] = self.pruned[:used]
        if target == "dense_inputs":
            some = self.dense[:used]
        elif target == "dense_outputs":
            some = list(zip(some, self.dense[:used], strict=True))
        return runner.measured(part, some, counts), sum(counts)

    def judge(self, runner: Runner, part: Any, alone: Any, new: Any) -> guard.Verdict:
        """Returns which of a block's restored kernels are kept, and how far its outputs are.

        Args:
            runner: Compiled programs of the block.
            part: Variables of the dense block.
            alone: Its kernels with the masks alone, by name.
            new: Its kernels restored, by name.
        """
        dense = [runner.whole(part, one) for one in self.dense[self.used :] if one is not None]

        def apart(kernels: Mapping[str, Any], states: Sequence[Any]) -> float:
            own = variables_with(part, kernels)
            return guard.mean_apart([runner.whole(own, one) for one in states], dense)

        judged = guard.judged(lambda kernels: apart(kernels, self.pruned[self.used :]), alone, new)
        return dataclasses.replace(judged, all_alone=apart(alone, self.alone))

    def advance(self, runner: Runner, parts: Mapping[str, Any], later: Any, offload: bool) -> None:
        """Takes the streams through a block, batch after batch: what it was given is freed.

        Args:
            runner: Compiled programs of the block.
            parts: Variables of the block, "dense", "alone" and "restored".
            later: Blocks that follow.
            offload: Whether activations go to host memory.
        """
        streams = {"restored": self.pruned, "dense": self.dense, "alone": self.alone}
        for name, states in streams.items():
            for at, state in enumerate(states):
                if state is not None:
                    states[at] = runner.advanced(parts[name], state, later, offload)
