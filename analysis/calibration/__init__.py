"""Measured ceilings: `stagetrace calibrate` measures the components of a step in isolation."""
