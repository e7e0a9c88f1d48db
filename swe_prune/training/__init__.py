"""State, step, optimizer, losses and loop. Read `step.py` first."""
