"""CONTRIBUTING.md names files and functions that exist."""

import ast
import re
from pathlib import Path


def names_of(file: Path) -> set[str]:
    """Functions, methods, classes and assigned names of a Python file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for name in targets if isinstance(name, ast.Name)}
    return found


def test_each_step_of_the_walk_exists(repo_root: Path) -> None:
    text = (repo_root / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `([^`]+\.py)` \| (.+) \|$", text, re.M)
    assert len(rows) >= 15
    for file, names in rows:
        for name in re.findall(r"`([^`]+)`", names):
            assert name in names_of(repo_root / file), f"{file} has no {name}"


def test_each_place_of_a_recipe_exists(repo_root: Path) -> None:
    text = (repo_root / "CONTRIBUTING.md").read_text()
    recipes = " ".join(text[text.index("## Recipes") :].split())
    places = re.findall(r"`(\w+)` (?:of|in) `((?:vllm_capmoe|kernels|tests)/[^`]+\.py)`", recipes)
    assert len(places) >= 8
    for name, file in places:
        if name == "metric":  # a setting: a field of the configuration
            assert "metric: str" in (repo_root / file).read_text()
            continue
        assert name in names_of(repo_root / file), f"{file} has no {name}"
    for file in re.findall(r"`([\w./]+\.(?:py|sh|md))`", text):
        assert (repo_root / file).exists(), file
