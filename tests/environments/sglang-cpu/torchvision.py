"""Stands in for torchvision, whose builds need CUDA, so that SGLang and transformers can be imported without it.

Every module and name of it can be imported. What serves text uses none of them; whatever does use one is told so.
"""

from __future__ import annotations

import sys
from enum import Enum
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from types import ModuleType

__version__ = "0.0.0"
__path__: list[str] = []


class InterpolationMode(Enum):
    """Ways to resize an image: image processors name them in their defaults."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Names(type):
    """A class whose attributes are such classes again, as `ImageReadMode.RGB` is in a default."""

    def __getattr__(cls, name: str) -> type:
        return _missing(f"{cls.__name__}.{name}", name)


def _missing(full_name: str, name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(full_name)

    def use(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"{full_name}: there is no torchvision for the CPU in this environment")

    return _Names(full_name, (), {"__new__": use})


class _Modules(MetaPathFinder, Loader):
    """Finds every module under this one."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(f"{__name__}.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: _named(f"{module.__name__}.{name}", name)  # type: ignore[method-assign]


def _named(full_name: str, name: str) -> type:
    return InterpolationMode if name == InterpolationMode.__name__ else _missing(full_name, name)


def __getattr__(name: str) -> type:
    return _named(f"{__name__}.{name}", name)


sys.meta_path.append(_Modules())
