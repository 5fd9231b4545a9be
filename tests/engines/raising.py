"""Hooks that are made to fail: a sitecustomize.py for the engine's processes."""

# What every hook does before and after the engine's function raises, but for those that open a ring.
RAISES = """
from dataclasses import replace
from stagetrace.instrument import hooks
install = hooks.wrap
def raises():
    raise RuntimeError("made to fail")
def wrap(original, around, hook):
    if hook.point.level:
        around = replace(around, before=around.before and raises, after=around.after and raises)
    return install(original, around, hook)
hooks.wrap = wrap
"""
