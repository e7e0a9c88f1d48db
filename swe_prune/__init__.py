"""Trajectory-based weight pruning for JAX."""
