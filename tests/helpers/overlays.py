"""A virtual environment over the running one: its packages, but another copy of ours."""

import sys
import sysconfig
import venv
from pathlib import Path


def make_overlay(folder: Path, *paths: Path) -> Path:
    """Make an environment in `folder` and return its Python.

    What it finds, first to last: its own site-packages (empty), `paths`, what the running
    environment holds as files. An editable install of ours is none of that, so nothing of this
    checkout can be imported by mistake, not by a process that a test starts either. `vllm` and
    `ray` stand beside the Python, as the tests look for them.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    python = folder / "bin" / "python"
    here = sysconfig.get_paths()["purelib"]
    site = folder / Path(here).relative_to(sys.prefix)
    (site / "overlay.pth").write_text("".join(f"{path}\n" for path in (*paths, here)))
    for name in ("vllm", "ray"):
        script = Path(sys.executable).with_name(name)
        if script.exists():
            _, code = script.read_text().split("\n", 1)
            (folder / "bin" / name).write_text(f"#!{python}\n{code}")
            (folder / "bin" / name).chmod(0o755)
    return python
