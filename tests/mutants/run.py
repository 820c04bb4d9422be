"""Breaks the code, one line at a time, and says which tests notice: by hand, not in CI.

    .venv/bin/python tests/mutants/run.py [-k TEXT ...] [--jobs 2] [--timeout 300] [--no-baseline]

`mutants.toml` lists the mutants. Each is put into a copy of this working tree, where its tests run,
the cheapest first, until one fails ("killed") or all passed ("survived"). The copy is the only
place from which our packages can be imported there. Before, the tests of all chosen mutants must
pass on the copy as it is: a test that fails anyway kills nothing.

Exit status 1: a mutant is stale (its text isn't in the file exactly once), its tests could not run,
or it survived without a reason in the list.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from forks import Forks  # noqa: E402
from mutant_list import ROOT, Mutant, StaleError, mutants  # noqa: E402
from overlays import make_overlay  # noqa: E402

PACKAGES = ("vllm_capmoe", "kernels/capmoe_kernels")


@dataclass(frozen=True)
class Result:
    """status: killed, survived, stale or error. said: by which test, or what went wrong."""

    status: str
    said: str
    seconds: float


class Copy:
    """A copy of the working tree in `folder`, with a Python that imports our packages from it."""

    def __init__(self, folder: Path):
        self.root = folder / "tree"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name)
        imports = folder / "imports"  # our packages alone: no other folder becomes importable
        imports.mkdir()
        for package in PACKAGES:
            (imports / Path(package).name).symlink_to(self.root / package)
        self.python = make_overlay(folder / "venv", imports)
        for package in imports.iterdir():
            code = f"import {package.name} as p, os; print(os.path.dirname(p.__file__), end='')"
            found = subprocess.run([self.python, "-P", "-c", code], capture_output=True, text=True)
            if Path(found.stdout) != package:
                raise RuntimeError(f"{package.name} comes from {found.stdout!r}: {found.stderr}")

        self.log = folder / "log"
        # Compiled files of a mutant would serve the next one, if both were made in one second.
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        self.forks = Forks(env, python=self.python, folder=self.root, tests=True)

    def test(self, arguments: str, timeout: float) -> tuple[int | None, str]:
        """Run pytest. Returns its exit status (None: no end in time) and its last words."""
        paths, _, expression = arguments.partition(" -k ")
        command = ["-x", "-q", "-p", "no:cacheprovider", *paths.split()]
        command += ["-k", expression] if expression else []
        _, code = self.forks.run("pytest", command, self.log, timeout)
        lines = self.log.read_text(errors="replace").splitlines()
        short = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
        return code, short[0] if short else ""

    def close(self) -> None:
        self.forks.close()

    def try_out(self, mutant: Mutant, timeout: float) -> Result:
        start, path = time.monotonic(), self.root / mutant.file
        before = path.read_text()
        try:
            mutant.put_into(self.root)
            for arguments in mutant.tests:
                code, said = self.test(arguments, timeout)
                seconds = time.monotonic() - start
                if code == 1 or code is None:
                    return Result("killed", said if code else f"no end: {arguments}", seconds)
                if code != 0:
                    return Result("error", f"pytest {arguments} ended with {code}: {said}", seconds)
            return Result("survived", mutant.survives, time.monotonic() - start)
        except StaleError as error:
            return Result("stale", str(error), time.monotonic() - start)
        finally:
            path.write_text(before)


def baseline(copy: Copy, chosen: Iterable[Mutant], timeout: float) -> list[str]:
    """The test runs of the mutants that don't pass on the code as it is, with their last words."""
    failed = []
    for arguments in sorted({each for mutant in chosen for each in mutant.tests}):
        code, said = copy.test(arguments, timeout)
        print(f"{'passes' if code == 0 else 'FAILS':9}{arguments}", flush=True)
        if code != 0:
            failed.append(f"{arguments}: {code}: {said}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "-k", nargs="+", default=[""], metavar="TEXT", help="mutants with a TEXT in file or words"
    )
    parser.add_argument("--jobs", type=int, default=1, help="copies at work at a time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds of one pytest run")
    parser.add_argument("--no-baseline", action="store_true", help="believe that the tests pass")
    options = parser.parse_args()
    chosen = [m for m in mutants() if any(text in f"{m.file} {m.breaks}" for text in options.k)]
    results: dict[Mutant, Result] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for number in range(options.jobs):
            copies.put(Copy(Path(folder) / str(number)))
        if not options.no_baseline:
            copy = copies.get()
            if failed := baseline(copy, chosen, options.timeout):
                print("These fail without any mutant:", *failed, sep="\n")
                return 1
            copies.put(copy)

        def work(mutant: Mutant) -> None:
            copy = copies.get()
            result = results[mutant] = copy.try_out(mutant, options.timeout)
            copies.put(copy)
            where = f"{mutant.file}:{'?' if result.status == 'stale' else mutant.line(copy.root)}"
            print(
                f"{result.status:9}{result.seconds:6.1f} s  {where}  {mutant.breaks}\n"
                f"{'':19}{result.said}",
                flush=True,
            )

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(work, chosen))
        while not copies.empty():
            copies.get().close()

    def count(status: str) -> int:
        return sum(result.status == status for result in results.values())

    judged = count("killed") + count("survived")
    print(
        f"{len(chosen)} mutants: {count('killed')} killed ({count('killed') / max(1, judged):.0%}),"
        f" {count('survived')} survived, {count('stale')} stale, {count('error')} without a result"
    )
    unexplained = any(r.status == "survived" and not r.said for r in results.values())
    return int(bool(count("stale") or count("error") or unexplained))


if __name__ == "__main__":
    sys.exit(main())
