"""What a model is worth: loss, perplexity, what it writes, and how far from the dense one it is."""

from swe_prune.evaluation.loss import mean_loss
from swe_prune.evaluation.perplexity import PerplexityResult, gate, perplexity
from swe_prune.evaluation.protocols import Protocol

__all__ = ["PerplexityResult", "Protocol", "gate", "mean_loss", "perplexity"]
