"""What a model is worth: loss on fixed validation windows."""

from swe_prune.evaluation.loss import mean_loss

__all__ = ["mean_loss"]
