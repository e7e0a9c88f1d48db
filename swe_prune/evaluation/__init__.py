"""Evaluation of a model: loss, perplexity, generated text, and distance from the dense model."""

from swe_prune.evaluation.distance import Distance, kl_to_dense
from swe_prune.evaluation.generation import Generated, generate
from swe_prune.evaluation.loss import mean_loss
from swe_prune.evaluation.perplexity import PerplexityResult, gate, perplexity
from swe_prune.evaluation.protocols import Protocol
from swe_prune.evaluation.repetition import Repetition, repetition
from swe_prune.evaluation.sampling import GREEDY, Sampling

__all__ = [
    "GREEDY",
    "Distance",
    "Generated",
    "PerplexityResult",
    "Protocol",
    "Repetition",
    "Sampling",
    "gate",
    "generate",
    "kl_to_dense",
    "mean_loss",
    "perplexity",
    "repetition",
]
