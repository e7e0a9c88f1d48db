"""How a run starts, shares its files, and ends: processes, storage, locks and signals."""
