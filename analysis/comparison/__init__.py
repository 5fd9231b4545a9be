"""Compares two sets of sessions: metric by metric, stage by stage, with what chance alone could have made of it."""
