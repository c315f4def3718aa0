"""Finds in the syntax trees of kvmpass what is raised with a remedy outside of the checks of ``kvmpass doctor``."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType

from kvmpass.errors import KvmpassError

PACKAGE = Path(__file__).parents[1] / "kvmpass"
# Helpers that raise: the positions of the message and of the remedy among their arguments.
_HELPERS = {"check": (1, 3), "failure": (1, 3), "run_tool": (1, 2)}
_TRANSPARENT = frozenset({"decode", "partition", "rstrip", "strip"})


class Unreadable(Exception):
    """A remedy that is neither written out, nor a constant, nor the argument of a caller."""


@dataclass(frozen=True, order=True)
class Raised:
    """An exception that is made somewhere, or a note that is added to one; words in capitals stand for values."""

    package: str
    """The package, or the module at the top, that raises it."""
    message: str
    """What the exception says; empty for a note on an exception of another place."""
    remedy: str
    """What the hint says; empty without one."""


def shown(node: ast.AST) -> str:
    """A word in capitals for the value of an expression."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.strip("_").upper().replace("_", "-")
        case ast.Call(func=ast.Attribute(attr="join"), args=[argument]):
            return shown(argument)
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in _TRANSPARENT:
            return shown(value)
        case ast.Call(func=ast.Name(), args=[*_, argument]):
            return shown(argument)
        case ast.Call(func=function):
            return shown(function)
        case ast.IfExp(body=value) | ast.BoolOp(values=[value, *_]) | ast.BinOp(left=value):
            return shown(value)
        case ast.Subscript(value=value) | ast.GeneratorExp(elt=value):
            return shown(value)
    return "VALUE"


class _Scope:
    """The names that an expression can use: of its module, and of its function."""

    def __init__(self, module: ModuleType, function: ast.FunctionDef | None) -> None:
        self.module = module
        self.parameters: set[str] = set()
        self.assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(function) if function else ():
            match node:
                case ast.arg(arg=name):
                    self.parameters.add(name)
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.assigned.setdefault(name, []).append(value)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    self.assigned.setdefault(name, []).append(value)

    def texts(self, node: ast.AST) -> list[str]:
        """Everything that an expression of type ``str | None`` can be. Raises :class:`Unreadable`."""
        match node:
            case ast.Constant(value=None):
                return []
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return ["".join(map(self._part, parts))]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [first + second for first in self.texts(left) for second in self.texts(right)]
            case ast.IfExp(body=first, orelse=second) | ast.BoolOp(values=[first, second]):
                return [*self.texts(first), *self.texts(second)]
            case ast.Call(func=ast.Attribute(value=table, attr="get")):
                return self.texts(table)
            case ast.Subscript(value=ast.Attribute(attr="__notes__")):
                return []
            case ast.Subscript(value=ast.Name(id=name)) if isinstance(getattr(self.module, name, None), dict):
                return [eval(ast.unparse(node), vars(self.module))]
            case ast.Dict(values=values):
                return [text for value in values for text in self.texts(value)]
            case ast.Name(id=name) if name in self.assigned:
                values, self.assigned[name] = self.assigned[name], []  # it may be assigned from itself
                found = [text for value in values for text in self.texts(value)]
                self.assigned[name] = values
                return found
            case ast.Name(id=name) if name in self.parameters:
                return []
            case ast.Attribute(value=ast.Name(id="self"), attr="remedy"):
                return []
            case ast.Name(id=name) if isinstance(value := getattr(self.module, name, None), str | dict):
                return [value] if isinstance(value, str) else list(value.values())
            case ast.Call(func=ast.Name(id=name)) if isinstance(
                value := getattr(self.module, name, None), FunctionType
            ):
                return _returned(value)
        raise Unreadable(f"{self.module.__name__}, line {getattr(node, 'lineno', '?')}: {ast.unparse(node)}")

    def _part(self, part: ast.AST) -> str:
        if not isinstance(part, ast.FormattedValue):
            return self.texts(part)[0]
        try:
            return max(self.texts(part.value), key=len)
        except (Unreadable, ValueError):
            return shown(part.value)

    def message(self, node: ast.AST | None) -> str:
        """What the exception says, as far as it is written out."""
        try:
            return " / ".join(self.texts(node)) or shown(node) if node else ""
        except Unreadable:
            return shown(node) if node else ""


def _returned(function: FunctionType) -> list[str]:
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    scope = _Scope(importlib.import_module(function.__module__), tree)
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value]
    return [text for value in values for text in scope.texts(value)]


Function = ast.FunctionDef | None


def _argument(call: ast.Call, position: int, name: str = "") -> ast.expr | None:
    named = [keyword.value for keyword in call.keywords if keyword.arg == name]
    return named[0] if named else call.args[position] if len(call.args) > position else None


def _calls(node: ast.AST, function: Function = None) -> Iterator[tuple[ast.Call, Function]]:
    """Every call, and the function that it is in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child, function
        yield from _calls(child, child if isinstance(child, ast.FunctionDef) else function)


def _pair(call: ast.Call, module: ModuleType) -> tuple[ast.expr | None, ast.expr | None]:
    """The expressions of the message and of the remedy."""
    match call.func:
        case ast.Attribute(attr="add_note"):
            return None, call.args[0]
        case ast.Name(id=name) if name in _HELPERS:
            message, remedy = _HELPERS[name]
            return _argument(call, message), _argument(call, remedy, "remedy")
        case ast.Name(id=name):
            value = getattr(module, name, None)
            error = isinstance(value, type) and issubclass(value, KvmpassError)
            if error or name == "kind":  # a parameter or variable for an exception's class
                return _argument(call, 0), _argument(call, 1, "remedy")
    return None, None


@functools.cache
def raised() -> tuple[Raised, ...]:
    """Return what the code raises, in the order of the packages. Raises :class:`Unreadable`."""
    return tuple(_raised())


def _raised() -> Iterator[Raised]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__main__.py":
            continue
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        for call, function in _calls(ast.parse(path.read_text())):
            message, remedy = _pair(call, module)
            if message is None and remedy is None:
                continue
            scope = _Scope(module, function)
            for text in (scope.texts(remedy) if remedy else []) or ([""] if message else []):
                yield Raised(".".join(parts[:2]), scope.message(message), text)


def error_classes() -> list[type[KvmpassError]]:
    """Every exception class of kvmpass, by name."""
    raised()  # imports every module
    found, todo = set(), [KvmpassError]
    while todo:
        found.add(last := todo.pop())
        todo += last.__subclasses__()
    return sorted((error for error in found if error.__module__.startswith("kvmpass.")), key=lambda one: one.__name__)
