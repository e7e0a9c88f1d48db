"""The former name of `select.restrict`."""

from swe_prune.select import restrict as among

__all__ = ["among"]
