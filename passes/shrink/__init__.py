"""Passes that take out what contributes nothing, or a constant."""
