"""Sessions of real engines with a cause of slowness put there on purpose, of random size, and clean ones.

Everything that is left to chance comes from one random.Random: the same seed plans the same session.
"""
