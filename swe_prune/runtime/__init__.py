"""Processes, files, buckets, locks and signals: how a run starts, shares and ends."""
