"""Runs the tests whose result could depend on time again and again, beside other work.

    .venv/bin/python tests/repeat.py [--times 20] [--hogs 2] [FILE ...]

The tests marked `timing` of each file that has any, or all of each FILE, are run `--times` times in
a row while `--hogs` processes keep as many cores busy. The first failure ends it, with exit status
1 and what pytest said.
"""

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def sensitive() -> list[Path]:
    """The files with tests marked `timing`."""
    return [path for path in sorted(TESTS.rglob("test_*.py")) if "mark.timing" in path.read_text()]


@contextlib.contextmanager
def busy(hogs: int) -> Iterator[None]:
    """So many processes that compute without end."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(hogs)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--hogs", type=int, default=2)
    options = parser.parse_args()
    selected = [] if options.files else ["-m", "timing"]
    with busy(options.hogs):
        for file in options.files or sensitive():
            for number in range(1, options.times + 1):
                started = time.monotonic()
                done = subprocess.run(
                    [sys.executable, "-m", "pytest", "-x", "-q", *selected, file],
                    cwd=TESTS.parent,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    check=False,
                )
                seconds = time.monotonic() - started
                print(f"{file.name}  {number}/{options.times}  {seconds:.0f} s", flush=True)
                if done.returncode != 0:
                    print(done.stdout)
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
