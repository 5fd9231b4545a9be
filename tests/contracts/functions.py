"""What a function of a package is, by reading its source: where it is defined, its parameters. Nothing is imported.

`find` follows what Python would do for `module:Class.function`: names that a module imports from another one, and the
method resolution order of a class over the modules that its bases lie in. It stops at the package's border: what a base
of another package has is not known.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

# Decorators by their last name, and methods that Python makes so -> the type of what comes of a function, where that is
# no function.
NO_FUNCTION = {
    "staticmethod": "staticmethod",
    "classmethod": "classmethod",
    "property": "property",
    "setter": "property",
    "deleter": "property",
    "cached_property": "cached_property",
    "cache": "_lru_cache_wrapper",
    "lru_cache": "_lru_cache_wrapper",
    "jit": "JITFunction",
    "__new__": "staticmethod",
    "__init_subclass__": "classmethod",
    "__class_getitem__": "classmethod",
}
# Bases of other packages that have no functions which anybody would hook.
EMPTY = {"object", "ABC", "Generic", "Protocol"}


@dataclass(frozen=True)
class Fact:
    """What is at a target: a function with `parameters`, something else (`kind`), or nothing (`missing`: why)."""

    parameters: tuple[str, ...] = ()
    kind: str = "function"
    missing: str = ""
    at: str = ""  # where it is defined, if that is not the target


@dataclass(frozen=True)
class Imported:
    """A name that a module has from elsewhere; `name` is None for a module itself."""

    module: str
    name: str | None


@dataclass
class Namespace:
    """The names of a module or of a class, each with all that binds it, the last first."""

    module: str
    names: dict[str, list[ast.AST | Imported]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)  # modules that all names are imported from


@dataclass(frozen=True)
class Class:
    """A class: where its statement is."""

    module: str
    name: str  # qualified
    node: ast.ClassDef = field(compare=False)


@dataclass(frozen=True)
class Elsewhere:
    """A base that another package has."""

    name: str


_Found = Class | tuple[str, ast.AST] | None  # a class, or another statement and where that is


class Code:
    """The modules of a package. `read` gives a file's text by its path from where packages lie, None: no such file."""

    def __init__(self, read: Callable[[str], str | None]):
        self._read = read
        self._modules: dict[str, Namespace | None] = {}

    def find(self, target: str) -> Fact:
        """What is at `module:Class.function`."""
        module, _, path = target.partition(":")
        if self._module(module) is None:
            return Fact(missing=f"there is no module {module}")
        *owners, name = path.split(".")
        owner: Class | None = None
        for each in owners:
            found = self._get(owner or module, each)
            if not isinstance(found, Class):
                return Fact(missing=f"{owner.name if owner else module} has no class {each}")
            owner = found
        found = self._get(owner or module, name)
        if found is None:
            return Fact(missing=self._why_missing(owner, module, name))
        if isinstance(found, Class):
            return Fact(kind="type")
        where, node = found
        at = "" if where == f"{module}:{path}" else where
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            made = NO_FUNCTION.get(_last_word(node), "value") if isinstance(node, ast.Call) else "value"
            return Fact(kind=made, at=at)
        words = [*map(_last_word, node.decorator_list), *([node.name] if owner else [])]
        kinds = [NO_FUNCTION[word] for word in words if word in NO_FUNCTION]
        return Fact(tuple(_parameters(node.args)), kinds[0] if kinds else "function", at=at)

    def _why_missing(self, owner: Class | None, module: str, name: str) -> str:
        if owner is None:
            return f"{module} has no {name}"
        beyond = [one.name for one in self._order(owner) if isinstance(one, Elsewhere)]
        return f"{owner.name} has no {name}" + (f", unless {', '.join(beyond)} has" if beyond else "")

    def _get(self, owner: Class | str, name: str) -> _Found:
        """What a module or class has under a name: a class, or a node and where that is; None: nothing."""
        if isinstance(owner, str):
            return self._named(owner, name)
        for one in self._order(owner):
            if isinstance(one, Class):
                for node in _namespace(one.module, one.node.body).names.get(name, ()):
                    if isinstance(node, Imported):
                        found = self._imported(node)
                    elif isinstance(node, ast.ClassDef):
                        found = Class(one.module, f"{one.name}.{name}", node)
                    elif isinstance(node, ast.Name) and node.id != name:  # `forward = other`
                        found = self._get(one, node.id) or self._named(one.module, node.id)
                    else:
                        found = f"{one.module}:{one.name}.{name}", node
                    if found is not None:
                        return found
        return None

    def _named(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> _Found:
        space = self._module(module)
        if space is None or (module, name) in seen:
            return None
        seen |= {(module, name)}
        found: _Found
        for node in space.names.get(name, ()):
            if isinstance(node, Imported):
                found = self._imported(node, seen)
            elif isinstance(node, ast.ClassDef):
                found = Class(module, name, node)
            elif isinstance(node, ast.Name):
                found = self._named(module, node.id, seen)
            else:
                found = f"{module}:{name}", node
            if found is not None:  # of a package that is not there, say, in a try
                return found
        stars = (self._named(star, name, seen) for star in space.stars)
        return next((one for one in stars if one is not None), None)

    def _imported(self, node: Imported, seen: frozenset[tuple[str, str]] = frozenset()) -> _Found:
        found = self._named(node.module, node.name, seen) if node.name else None
        module = f"{node.module}.{node.name}" if node.name else node.module
        if found is None and self._module(module) is not None:
            return module, ast.Module([], [])
        return found

    def _order(self, one: Class) -> list[Class | Elsewhere]:
        """The method resolution order (C3, as in Python's documentation), with bases from elsewhere at their place."""
        bases = [self._base(one.module, node) for node in one.node.bases]
        known = [base for base in bases if not (isinstance(base, Elsewhere) and base.name in EMPTY)]
        orders = [self._order(base) if isinstance(base, Class) else [base] for base in known]
        return [one, *_merged([*orders, known])]

    def _base(self, module: str, node: ast.expr) -> Class | Elsewhere:
        if isinstance(node, ast.Subscript):  # Generic[T]
            return self._base(module, node.value)
        if isinstance(node, ast.Name):
            found = self._named(module, node.id)
        elif isinstance(node, ast.Attribute):
            named = self._module_of(module, node.value)
            found = self._named(named, node.attr) if named else None
        else:
            found = None
        return found if isinstance(found, Class) else Elsewhere(_last_word(node))

    def _module_of(self, module: str, node: ast.expr) -> str | None:
        """The module that an expression names, as `parallel_state` after `from vllm.distributed import ...`."""
        if isinstance(node, ast.Name):
            space = self._module(module)
            for found in space.names.get(node.id, ()) if space else ():
                if isinstance(found, Imported):
                    return f"{found.module}.{found.name}" if found.name else found.module
        elif isinstance(node, ast.Attribute):
            outer = self._module_of(module, node.value)
            return f"{outer}.{node.attr}" if outer else None
        return None

    def _module(self, name: str) -> Namespace | None:
        if name not in self._modules:
            path = name.replace(".", "/")
            text = self._read(f"{path}.py")
            package = name if text is None else name.rpartition(".")[0]
            if text is None:
                text = self._read(f"{path}/__init__.py")
            self._modules[name] = None if text is None else _namespace(name, ast.parse(text).body, package)
        return self._modules[name]


def _merged(orders: list[list[Class | Elsewhere]]) -> Iterator[Class | Elsewhere]:
    while orders := [order for order in orders if order]:
        tails = [one for order in orders for one in order[1:]]
        # A real class has an order; one whose bases from elsewhere hide it takes the first that comes.
        head = next((order[0] for order in orders if order[0] not in tails), orders[0][0])
        yield head
        orders = [[one for one in order if one != head] for order in orders]


def _namespace(module: str, body: Iterable[ast.stmt], package: str = "") -> Namespace:
    """What statements bind, those inside of if, try and with as well."""
    space = Namespace(module)

    def bind(name: str, node: ast.AST | Imported) -> None:
        space.names.setdefault(name, []).insert(0, node)

    for statement in _statements(body):
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                if "overload" not in map(_last_word, statement.decorator_list):
                    bind(statement.name, statement)
            case ast.ClassDef():
                bind(statement.name, statement)
            case ast.ImportFrom():
                source = _absolute(statement, package)
                for alias in statement.names:
                    if alias.name == "*":
                        space.stars.append(source)
                    else:
                        bind(alias.asname or alias.name, Imported(source, alias.name))
            case ast.Import():
                for alias in statement.names:
                    first = alias.name.partition(".")[0]
                    bind(alias.asname or first, Imported(alias.name if alias.asname else first, None))
            case ast.Assign(targets=targets, value=value):
                for one in targets:
                    if isinstance(one, ast.Name):
                        bind(one.id, value)
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
                bind(name, value)
    return space


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """In an order in which the last binding is the usual one: of a condition its body, of a try what it tries."""
    for statement in body:
        match statement:
            case ast.If(test=test) if _last_word(test) == "TYPE_CHECKING":
                yield from _statements(statement.orelse)
            case ast.If():
                yield from _statements([*statement.orelse, *statement.body])
            case ast.Try():
                handled = [each for handler in statement.handlers for each in handler.body]
                yield from _statements([*handled, *statement.body, *statement.orelse, *statement.finalbody])
            case ast.With():
                yield from _statements(statement.body)
            case _:
                yield statement


def _absolute(statement: ast.ImportFrom, package: str) -> str:
    if not statement.level:
        return statement.module or ""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - statement.level + 1], *([statement.module] if statement.module else [])])


def _last_word(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(attr=name):
            return name
        case ast.Call(func=function):
            return _last_word(function)
        case ast.Subscript(value=value):
            return _last_word(value)
    return ast.unparse(node)


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    """All names, in the order of inspect.signature."""
    for one in (*arguments.posonlyargs, *arguments.args):
        yield one.arg
    if arguments.vararg:
        yield arguments.vararg.arg
    for one in arguments.kwonlyargs:
        yield one.arg
    if arguments.kwarg:
        yield arguments.kwarg.arg
