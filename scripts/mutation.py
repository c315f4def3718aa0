"""What a mutant is: one small fault in one file, by the operators of cosmic-ray and one of our own.

:mod:`mutants` runs the tests against them.
"""

from __future__ import annotations

import ast
import difflib
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator, operator_names

Position = tuple[int, int]


class CallLeftOut(Operator):  # type: ignore[misc]
    """An operator of cosmic-ray that replaces a statement which is a call, and nothing else, with ``pass``."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Position, Position]]:
        if self._is_call(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        return parso.python.tree.Keyword("pass", node.start_pos, prefix=node.get_first_leaf().prefix)

    @staticmethod
    def _is_call(node: Any) -> bool:
        if node.type not in ("atom_expr", "power") or node.parent.type not in ("simple_stmt", "suite", "file_input"):
            return False
        last = node.children[-1]
        return bool(last.type == "trailer" and last.children[0].value == "(")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("f(x)", "pass"), Example("a.b(1).c()\nd = e()", "pass\nd = e()"))


# What a mutant is, by the names of cosmic-ray's operators. Each arithmetic operator has one counterpart: most of the
# others change nothing where bits are disjoint (+, | and ^), or everything (a power, a division that makes a float).
_ORDER = "(Eq|NotEq|Lt|LtE|Gt|GtE)"
_COUNTERPARTS = (
    "Add_Sub|Sub_Add|Mul_FloorDiv|FloorDiv_Mul|Mod_Mul|LShift_RShift|RShift_LShift|BitAnd_BitOr|BitOr_BitAnd"
    "|BitXor_BitAnd"
)
KINDS = {
    "comparison": re.compile(f"ReplaceComparisonOperator_({_ORDER}_{_ORDER}|Is_IsNot|IsNot_Is)$"),
    "operator": re.compile(f"Replace(BinaryOperator_({_COUNTERPARTS})|UnaryOperator_Delete_(USub|Invert))$"),
    "condition": re.compile(
        r"AddNot|ReplaceUnaryOperator_Delete_Not|Replace(TrueWithFalse|FalseWithTrue|AndWithOr|OrWithAnd"
        r"|BreakWithContinue|ContinueWithBreak)|ZeroIterationForLoop|ExceptionReplacer"
    ),
    "number": re.compile("NumberReplacer"),
    "call": re.compile("CallLeftOut"),
}


def operators() -> Iterator[tuple[str, str, Operator]]:
    """Kind, name and instance of each operator that is used."""
    found = {name.rpartition("/")[2]: get_operator(name) for name in operator_names()}
    found[CallLeftOut.__name__] = CallLeftOut
    for name, operator in sorted(found.items()):
        kind = next((kind for kind, names in KINDS.items() if names.match(name)), None)
        if kind:
            yield kind, name, operator()


@dataclass(frozen=True)
class Mutant:
    """One change of one file; ``line`` counts from 1."""

    file: str
    line: int
    kind: str
    operator: str
    before: str
    after: str

    @property
    def changed(self) -> tuple[str, str]:
        """The lines that differ, before and after, without their indentation."""
        old, new = self.before.splitlines(), self.after.splitlines()
        sides: tuple[list[str], list[str]] = [], []
        for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if tag != "equal":
                sides[0].extend(line.strip() for line in old[a:b])
                sides[1].extend(line.strip() for line in new[c:d])
        return "\n".join(sides[0]), "\n".join(sides[1])

    @property
    def diff(self) -> str:
        before, after = self.before.splitlines(), self.after.splitlines()
        return "\n".join(difflib.unified_diff(before, after, f"a/{self.file}", f"b/{self.file}", lineterm="", n=2))

    def __str__(self) -> str:
        old, new = self.changed
        return f"{self.file}:{self.line}: {self.kind}: {old!r} -> {new!r}"


def _left_alone(source: str) -> list[tuple[Position, Position]]:
    """What no test can or need notice: annotations, decorators, lines of the log, assertions for ourselves."""
    spots: list[ast.AST | None] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef():
                spots += [node.returns, *node.decorator_list]
            case ast.ClassDef():
                spots += node.decorator_list
            case ast.arg() | ast.AnnAssign():
                spots.append(node.annotation)
            case (
                ast.Assert()
                | ast.keyword(arg="strict")
                | ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="log"))))
            ):
                spots.append(node)
    return [((s.lineno, s.col_offset), (s.end_lineno, s.end_col_offset)) for s in spots if s is not None]  # type: ignore[attr-defined]


def sites(file: str, source: str) -> dict[tuple[str, Position], list[tuple[str, Operator, int]]]:
    """Where ``source`` can be mutated, by kind and position: the operators for that, and which occurrence it is."""
    tree, alone = get_ast(source), _left_alone(source)
    found: dict[tuple[str, Position], list[tuple[str, Operator, int]]] = defaultdict(list)
    for kind, name, operator in operators():
        positions = [start for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for occurrence, at in enumerate(positions):
            if not any(start <= at < end for start, end in alone):
                found[kind, at].append((name, operator, occurrence))
    return found


def _make(file: str, source: str, kind: str, at: Position, choice: tuple[str, Operator, int]) -> Mutant | None:
    name, operator, occurrence = choice
    after = mutate_code(source, operator, occurrence)
    if after is None or after == source:
        return None
    try:
        compile(after, file, "exec")
    except SyntaxError:
        return None
    return Mutant(file, at[0], kind, name, source, after)


def choose(sources: dict[str, str], number: int, seed: int) -> list[Mutant]:
    """``number`` mutants, at most one for each kind and place: as many of each kind as there are, in turn."""
    rng = random.Random(seed)
    decks: dict[str, list[Callable[[], Mutant | None]]] = {kind: [] for kind in KINDS}
    for file, source in sources.items():
        for (kind, at), choices in sites(file, source).items():
            choice = rng.choice(choices)
            decks[kind].append(lambda f=file, s=source, k=kind, a=at, c=choice: _make(f, s, k, a, c))  # type: ignore[misc]
    for deck in decks.values():
        rng.shuffle(deck)
    chosen: list[Mutant] = []
    while len(chosen) < number and any(decks.values()):
        for deck in decks.values():
            mutant = None
            while deck and mutant is None:
                mutant = deck.pop()()
            if mutant is not None and len(chosen) < number:
                chosen.append(mutant)
    return chosen


def every(sources: dict[str, str], file: str, lines: range) -> list[Mutant]:
    """All mutants of those lines of one file."""
    source = sources[file]
    made = (
        _make(file, source, kind, at, choice)
        for (kind, at), choices in sorted(sites(file, source).items(), key=lambda item: item[0][1])
        if at[0] in lines
        for choice in choices
    )
    return [mutant for mutant in made if mutant is not None]
