"""Whole units that go: which of them are redundant, and making up for those that are cut."""
