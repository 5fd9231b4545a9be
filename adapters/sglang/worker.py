"""Hooks in a rank: its part of every step."""
