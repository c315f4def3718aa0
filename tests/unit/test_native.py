"""The stub of the compiled module says what the compiled module has."""

import ast
from pathlib import Path

import kvmpass
from kvmpass._native import lib


def stub_members() -> dict[str, int | None]:
    tree = ast.parse((Path(kvmpass.__file__).parent / "_native.pyi").read_text())
    klass = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "_Lib")
    members: dict[str, int | None] = {}
    for node in klass.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            members[node.target.id] = None
        elif isinstance(node, ast.FunctionDef):
            members[node.name] = len(node.args.posonlyargs) - 1
    return members


def test_same_names() -> None:
    assert set(stub_members()) == {name for name in dir(lib) if not name.startswith("_")}


def test_constants_are_integers_and_functions_take_what_the_stub_says() -> None:
    for name, count in stub_members().items():
        member = getattr(lib, name)
        if count is None:
            assert isinstance(member, int), name
        else:
            try:
                member(*[object()] * (count + 1))
            except TypeError as error:
                wanted = "exactly one argument" if count == 1 else f"{count} arguments"
                assert wanted in str(error), (name, str(error))
            else:
                raise AssertionError(f"{name} took {count + 1} arguments")
