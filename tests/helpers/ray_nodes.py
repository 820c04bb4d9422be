"""Real Ray clusters on this machine, of one node or more."""

import contextlib
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from clusters import CLUSTER
from engines import environment, free_port

RAY = Path(sys.executable).with_name("ray")


@contextlib.contextmanager
def _node(log: Path, ray: Path, env: dict[str, str], *arguments: str) -> Iterator[None]:
    """A node from when it runs to the end; none of its ports is Ray's default."""
    command = [str(ray), "start", "--block", "--num-cpus=8", "--disable-usage-stats", *arguments]
    command += ["--object-store-memory=100000000", f"--dashboard-agent-listen-port={free_port()}"]
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env=environment(**CLUSTER, **env),
            cwd=log.parent,  # this folder would be on the path of all workers
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield
    finally:
        # Politely it would drain the node first, for up to 30 s. Some end with others of them.
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        process.kill()
        process.wait(30)


@contextlib.contextmanager
def ray_head(folder: Path, *arguments: str) -> Iterator[dict[str, str]]:
    """The first node of a cluster; the environment that finds it."""
    port = free_port()
    # Without a token Ray would let anyone in who reaches the port.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ports = [f"--{name}-port={free_port()}" for name in ("ray-client-server", "dashboard")]
    command = ["--head", f"--port={port}", "--include-dashboard=false", *ports, *arguments]
    with _node(folder / "head.log", RAY, token, *command):
        yield {"RAY_ADDRESS": f"127.0.0.1:{port}", **token}


@contextlib.contextmanager
def ray_worker(folder: Path, ray: Path, cluster: dict[str, str], *arguments: str) -> Iterator[None]:
    """One more node, at 127.0.0.2, by another environment's `ray`."""
    command = [f"--address={cluster['RAY_ADDRESS']}", "--node-ip-address=127.0.0.2", *arguments]
    with _node(folder / "worker.log", ray, cluster, *command):
        yield
