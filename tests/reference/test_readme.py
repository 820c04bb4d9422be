"""The README tells the truth about flags, defaults, versions, metrics and the start-up line."""

import ast
import re
from pathlib import Path

from vllm_capmoe.config import OPTIONS
from vllm_capmoe.integration.compat import SUPPORTED, SUPPORTED_TEXT


def test_the_flags_table_is_the_list_of_options(repo_root: Path) -> None:
    table = re.findall(
        r"^\| `([a-z-]+)` \| (.+?) \((.+?)\) \|", (repo_root / "README.md").read_text(), re.M
    )
    rows = {name: (values, default) for name, values, default in table}
    assert list(rows) == [option.key.replace("_", "-") for option in OPTIONS]
    for option in OPTIONS:
        values, default = rows[option.key.replace("_", "-")]
        assert default.strip("`") == option.default_text
        for choice in option.choices or ():
            assert f"`{choice}`" in values


def test_versions(repo_root: Path) -> None:
    """The releases of vLLM that are served, wherever they are named."""
    assert f"vLLM {SUPPORTED_TEXT}. With another" in (repo_root / "README.md").read_text()
    (major, first), (_, last) = SUPPORTED[0], SUPPORTED[-1]
    pinned = f"vllm>={major}.{first},<{major}.{last + 1}"
    assert f'"{pinned}"' in (repo_root / "pyproject.toml").read_text()
    environments = (repo_root / ".ci" / "make_venv.py").read_text()
    made = re.findall(r'Release\("(\d+\.\d+)', environments)
    assert made == [f"{major}.{minor}" for major, minor in SUPPORTED]
    # What the compiler makes is compared under one Triton: the one that `make venv` brings.
    compiled = (repo_root / "docs" / "compiled_kernels.md").read_text()
    tritons = re.findall(r'triton="([\d.]+)"', environments)
    assert f"with Triton {tritons[0]};" in compiled


def test_metrics_and_the_start_up_line(repo_root: Path) -> None:
    """Read from the source, so that no vLLM is needed."""
    readme = (repo_root / "README.md").read_text()
    sources = repo_root / "vllm_capmoe" / "integration"
    calls = list(ast.walk(ast.parse((sources / "stats.py").read_text())))
    names = {
        value.value
        for call in calls
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "Counter"
        for value in [*call.args[2:3], *(k.value for k in call.keywords if k.arg == "series")]
        if isinstance(value, ast.Constant)
    }
    assert {"assignments", "dropped_assignments", "peak_load"} <= names
    for series in names:
        assert f"`{series}`" in readme
    line = readme[readme.index("MoE capacity: mode=") :].split("\n\n")[0]
    keys = re.findall(r'f"([a-z_]+)=\{', (sources / "layers.py").read_text())
    assert {"mode", "factor", "layers", "backend"} <= set(keys)
    assert set(keys) == set(re.findall(r"([a-z_]+)=", line))
