"""The README tells the truth about flags, defaults and versions."""

import re
from pathlib import Path

from vllm_capmoe.config import OPTIONS


def test_the_flags_table_is_the_list_of_options(repo_root: Path) -> None:
    table = re.findall(
        r"^\| `([a-z-]+)` \| (.+?) \((.+?)\) \|", (repo_root / "README.md").read_text(), re.M
    )
    rows = {name: (values, default) for name, values, default in table}
    assert list(rows) == [option.key.replace("_", "-") for option in OPTIONS]
    for option in OPTIONS:
        values, default = rows[option.key.replace("_", "-")]
        assert default.strip("`") == str("auto" if option.default is None else option.default)
        for choice in option.choices or ():
            assert f"`{choice}`" in values
