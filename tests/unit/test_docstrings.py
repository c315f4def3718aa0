"""What ruff's docstring rules cannot see: fields of dataclasses, and the sources of what wraps an ioctl."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from support.repository import ROOT

PACKAGE = ROOT / "kvmpass"
WRAPPERS = ("iommufd", "kvm", "vfio")
SOURCE = re.compile(r"\b(?:KVM|VFIO|IOMMU)_[A-Z_]{3,}|\w+\.(?:c|h|rst)\b")
_DATA = re.compile(r"(?:dataclasses\.)?dataclass\b")


def classes(*packages: str) -> Iterator[tuple[str, ast.ClassDef]]:
    """Every public class of some packages, or of all, and the module it is in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        package = path.relative_to(PACKAGE).parts[0]
        if not packages or package in packages:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    yield str(path.relative_to(PACKAGE)), node


def has_fields(node: ast.ClassDef) -> bool:
    """Whether it is a dataclass or a named tuple."""
    return any(_DATA.match(ast.unparse(decorator)) for decorator in node.decorator_list) or any(
        ast.unparse(base).endswith("NamedTuple") for base in node.bases
    )


def undocumented_fields(node: ast.ClassDef) -> Iterator[str]:
    """The public fields without a docstring of their own."""
    for field, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        match field:
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                if not documented and "ClassVar" not in ast.unparse(field.annotation):
                    yield name


def without_source(node: ast.ClassDef) -> Iterator[str]:
    """The public methods that call the kernel through a C function, and name neither its ioctl nor a file."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            calls = [ast.unparse(call.func) for call in ast.walk(method) if isinstance(call, ast.Call)]
            if any(call.startswith("lib.") for call in calls) and not SOURCE.search(ast.get_docstring(method) or ""):
                yield method.name


def test_fields_are_documented() -> None:
    missing = [
        f"{file}: {node.name}.{name}"
        for file, node in classes()
        if has_fields(node)
        for name in undocumented_fields(node)
    ]
    assert not missing


def test_wrappers_of_ioctls_name_their_source() -> None:
    missing = [f"{file}: {node.name}.{name}" for file, node in classes(*WRAPPERS) for name in without_source(node)]
    assert not missing


def test_what_is_missing_is_found() -> None:
    code = '''
@dataclass(frozen=True)
class Some:
    told: int
    """What it is."""
    untold: int
    _private: int

    def wrapped(self):
        """Do it."""
        check(lib.kvm_run(self.fd))
'''
    [node] = ast.parse(code).body
    assert isinstance(node, ast.ClassDef)
    assert has_fields(node)
    assert list(undocumented_fields(node)) == ["untold"]
    assert list(without_source(node)) == ["wrapped"]
