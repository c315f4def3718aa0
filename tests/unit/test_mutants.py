"""The script behind ``make mutants``: what it changes, what it chooses, and that its list of survivors holds."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.repository import ROOT

SOURCE = '''\
"""Text."""
import logging
log = logging.getLogger(__name__)


@staticmethod
def f(a: int | None, b: int = 1) -> int | None:
    assert a is not None
    log.debug("%d", a + 1)
    if a < b:
        g(a)
    return a + b
'''


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import mutants
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return mutants


@pytest.fixture(scope="module")
def mutation(mutants: ModuleType) -> ModuleType:
    """It is imported with the script."""
    return sys.modules["mutation"]


def changes(mutants: ModuleType, number: int = 100, seed: int = 1) -> list[tuple[str, str, str]]:
    chosen = mutants.choose({"f.py": SOURCE}, number, seed)
    return [(mutant.kind, *mutant.changed) for mutant in chosen]


def test_a_call_left_out_as_its_examples_say(mutation: ModuleType) -> None:
    for example in mutation.CallLeftOut.examples():
        made = mutation.mutate_code(example.pre_mutation_code, mutation.CallLeftOut(), example.occurrence)
        assert made == example.post_mutation_code
    for kept in ("x = f(1)", "return_(f)[0]", "x", "x += f()", "await_"):
        assert mutation.mutate_code(kept, mutation.CallLeftOut(), 0) is None


def test_every_place_is_changed_once_and_the_rest_left_alone(mutants: ModuleType) -> None:
    """Not annotations, decorators, assertions and the log."""
    found = changes(mutants)
    assert [kind for kind, *_ in found] == ["comparison", "operator", "condition", "number", "call"]
    by_kind = {kind: (was, now) for kind, was, now in found}
    assert by_kind["call"] == ("g(a)", "pass")
    assert by_kind["operator"] == ("return a + b", "return a - b")
    assert by_kind["condition"] == ("if a < b:", "if not a < b:")
    assert by_kind["number"][0] == "def f(a: int | None, b: int = 1) -> int | None:"


def test_a_seed_names_the_same_mutants(mutants: ModuleType) -> None:
    sources = mutants._sources(["kvmpass/kvm/memslots.py", "kvmpass/memory/plan.py"])
    chosen = [str(mutant) for mutant in mutants.choose(sources, 9, 5)]
    assert chosen == [str(mutant) for mutant in mutants.choose(sources, 9, 5)]
    assert chosen != [str(mutant) for mutant in mutants.choose(sources, 9, 6)]
    assert len(set(chosen)) == 9


def test_what_is_explained_is_there(mutants: ModuleType, tmp_path: Path) -> None:
    """Each entry's line, and the test in the emulated host that it names."""
    mutants.explanations()
    stale = tmp_path / "mutants.toml"
    for entry in (
        'was = "no such line"\nnow = "pass"\nwhy = ""',
        'was = "PAGE = 0x1000"\nnow = "pass"\nwhy = ""\ntest = "tests/amdvi/test_containment.py::test_nothing"',
    ):
        stale.write_text(f'[[survivor]]\nfile = "kvmpass/layout.py"\n{entry}\n')
        with pytest.raises(ValueError, match=r"no such line|test_nothing"):
            mutants.explanations(stale)


def test_an_entry_explains_one_change_or_all_that_begin_alike(mutants: ModuleType) -> None:
    [mutant] = [m for m in mutants.choose({"f.py": SOURCE}, 100, 1) if m.kind == "call"]
    for now, known in (("pass", True), ("pa*", True), ("*", True), ("passed", False), ("g*", False)):
        entry = mutants.Explanation("f.py", "g(a)", now, "because")
        assert (mutants.explained(mutant, [entry]) is entry) == known
    assert mutants.explained(mutant, [mutants.Explanation("g.py", "g(a)", "pass", "")]) is None
