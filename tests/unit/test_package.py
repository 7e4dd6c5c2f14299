"""The package as a whole: its version, and what each module says it offers."""

import ast
import importlib
import pkgutil
import re
from collections import defaultdict
from pathlib import Path

import pytest

import dalorra
import dalorra_core
import server

ROOT = Path(__file__).parents[2]


def _modules() -> list[str]:
    packages = (dalorra, dalorra_core, server)
    names = [package.__name__ for package in packages]
    for package in packages:
        found = pkgutil.walk_packages(package.__path__, prefix=f"{package.__name__}.")
        names += [module.name for module in found]
    return sorted(name for name in names if not name.endswith("__main__"))


def _imported_names() -> dict[str, set[str]]:
    """Return, for each of our modules, the names that other files of ours import from it."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for package in ("dalorra", "dalorra_core", "server"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module is not None:
                    wanted[node.module] |= {alias.name for alias in node.names}
    return wanted


MODULES = _modules()
IMPORTED = _imported_names()


def test_the_changelog_starts_with_the_version_of_the_package() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    assert released[0] == dalorra_core.__version__


@pytest.mark.parametrize("name", MODULES)
def test_all_lists_what_a_module_has_and_others_use(name: str) -> None:
    module = importlib.import_module(name)
    offered: list[str] | None = getattr(module, "__all__", None)
    assert offered is not None, f"{name} has no __all__"
    assert len(set(offered)) == len(offered)
    assert [entry for entry in offered if not hasattr(module, entry)] == []
    used = {entry for entry in IMPORTED[name] if f"{name}.{entry}" not in MODULES}
    assert used - set(offered) == set()
