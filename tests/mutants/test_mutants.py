"""The list of mutants can still be used: each text is there once, and its tests exist."""

import ast
import re

import pytest
from mutant_list import ROOT, Mutant, mutants

MUTANTS = mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.breaks)
def test_a_mutant_can_be_tried_out(mutant: Mutant) -> None:
    mutant.line(ROOT)
    text = (ROOT / mutant.file).read_text()
    changed = text.replace(mutant.find, mutant.replace)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(text))
    assert mutant.tests, "no test is named"
    for arguments in mutant.tests:
        paths, _, expression = arguments.partition(" -k ")
        text = "".join((ROOT / path.split("::")[0]).read_text() for path in paths.split())
        for name in re.findall(r"test_\w+", " ".join(paths.split("::")[1:]) + " " + expression):
            assert f"def {name}" in text or name in paths, f"{arguments}: no {name}"


def test_no_mutant_is_listed_twice() -> None:
    assert len({(m.file, m.find, m.replace) for m in MUTANTS}) == len(MUTANTS)
    assert len({m.breaks for m in MUTANTS}) == len(MUTANTS)
