"""Live control over HTTP: a plugin of vLLM's API server, which loads it only where it is asked to.

    VLLM_PLUGINS=capmoe,capmoe_control vllm serve ... --moe-capacity-mode drop --api-key SECRET

    GET  /v1/moe-capacity     settings; what each layer has counted, since the start and lately
    POST /v1/moe-capacity     {"factor": 1.2} or {"mode": "off"}: from the next step on, everywhere

Both stand under /v1 because vLLM asks for its API key there, and not everywhere. Without a key they
answer only where the server listens on this host alone.
"""

import asyncio
import ipaddress
import time
from dataclasses import dataclass
from typing import Any

import vllm.envs as envs
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from vllm.entrypoints.serve.middleware import authenticate
from vllm.logger import init_logger

from vllm_capmoe.integration import live_engine
from vllm_capmoe.integration.settings import capacity_config
from vllm_capmoe.integration.stats import Layer
from vllm_capmoe.layer_settings import layer_number, read_json, shown
from vllm_capmoe.live import differences
from vllm_capmoe.ranking import MASS_BITS
from vllm_capmoe.version import own_version

logger = init_logger("vllm.capmoe")

PATH = "/v1/moe-capacity"
WINDOW = 10.0  # seconds that the counts called "window" reach back, at least
STATE = "moe_capacity_control"  # of the application


@dataclass(frozen=True)
class Snapshot:
    """What the layers had counted at a time (`time.monotonic`)."""

    time: float
    layers: list[Layer]


class Refused(Exception):
    """A request that gets a status and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Control:
    """What the routes know of their server.

    engine: an `AsyncLLM`. closed: why they don't answer, if they don't. has_key: whether vLLM asks
    for one.
    older, newer: counts of earlier requests, at least `WINDOW` seconds apart.
    """

    def __init__(self, engine: Any, closed: Refused | None, has_key: bool):
        self.engine, self.closed, self.has_key = engine, closed, has_key
        self.changing = asyncio.Lock()
        self.started = self.older = self.newer = Snapshot(time.monotonic(), [])

    async def show(self) -> dict[str, Any]:
        """The answer to GET."""
        settings = await live_engine.read_settings(self.engine)
        now = Snapshot(time.monotonic(), await live_engine.read_counters(self.engine))
        if now.time - self.newer.time >= WINDOW:
            self.older, self.newer = self.newer, now
        return {
            "version": own_version(),
            **settings,
            "since_start": _counted(self.started, now),
            "window": _counted(self.older, now),
        }

    async def change(self, values: Any) -> dict[str, Any]:
        """The answer to POST."""
        async with self.changing:
            before = (await live_engine.read_settings(self.engine))["now"]
            began = time.monotonic()
            done = await live_engine.change(self.engine, values)
            seconds = round(time.monotonic() - began, 4)
        told = differences(before, done["now"])
        if told:
            logger.info("MoE capacity changed over HTTP in %.3f s: %s", seconds, told)
        return {"before": before, **done, "seconds": seconds}


def _counted(before: Snapshot, now: Snapshot) -> dict[str, Any]:
    """What the layers have counted in between, by the names of the metrics."""
    old = {layer["layer"]: layer for layer in before.layers}
    layers = [_less(layer, old.get(layer["layer"])) for layer in now.layers]
    return {
        "seconds": round(now.time - before.time, 3),
        "layers": [
            {
                "layer": layer["layer"],
                "number": layer_number(layer["layer"]),
                "steps": layer["steps"],
                "prompt_steps": layer["prompt_steps"],
                "load_before": layer["load_before"],
                "load_after": layer["load_after"],
                "dropped_assignments": layer["dropped"],
                "expanded_assignments": layer["expanded"],
                "tokens_without_expert": layer["left_without"],
                "peak_load_before": layer["max_before"],
                "peak_load_after": layer["max_after"],
                "gate_mass": layer["mass"] * 2.0**-MASS_BITS,
                "lost_gate_mass": layer["lost"] * 2.0**-MASS_BITS,
            }
            for layer in layers
        ],
    }


def _less(now: Layer, before: Layer | None) -> Layer:
    """What is new in the counters of a layer."""
    if before is None:
        return now
    return {
        key: [a - b for a, b in zip(value, before[key], strict=True)]
        if isinstance(value, list)
        else value - before[key]
        for key, value in now.items()
        if key != "layer"
    } | {"layer": now["layer"]}


router = APIRouter()


@router.get(PATH)
async def get_moe_capacity(request: Request) -> JSONResponse:
    """Settings and counts of the MoE layers."""
    return await _answer(request, lambda control, _: control.show())


@router.post(PATH)
async def change_moe_capacity(request: Request) -> JSONResponse:
    """Change settings on all ranks, between two steps."""
    # A client that leaves must not leave the engine paused.
    return await _answer(
        request, lambda control, values: asyncio.shield(control.change(values)), body=True
    )


async def _answer(request: Request, answer: Any, body: bool = False) -> JSONResponse:
    """What a route answers, errors in the form of vLLM's own."""
    try:
        control: Control | None = getattr(request.app.state, STATE, None)
        if control is None:
            raise Refused(503, "this server has no engine that could be asked.")
        if control.closed is not None:
            raise control.closed
        host = request.url.hostname
        if not control.has_key and not _is_loopback(host):
            # As of a page in a browser here, whose name was made to mean this host.
            raise Refused(
                403,
                f"the request is to {shown(host)}, but on a server without an API key one to "
                "localhost is accepted.",
            )
        content = await answer(control, await _body(request) if body else None)
        return JSONResponse(content)
    except Refused as refused:
        return _error(refused.status, str(refused))
    except ValueError as error:
        return _error(400, str(error))
    except Exception as error:
        logger.exception("MoE capacity: %s %s failed", request.method, PATH)
        return _error(500, f"{type(error).__name__}: {error}")


async def _body(request: Request) -> Any:
    """The JSON of a request.

    Raises:
        Refused: it is something else. (A page in a browser can send other content to this host
            without asking.)
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"the content is {kind or 'nothing'}, but application/json is accepted.")
    try:
        return read_json(await request.body(), "the content")
    except ValueError as error:
        raise Refused(400, f"{error}.") from None


def _error(status: int, sentence: str) -> JSONResponse:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    return JSONResponse(
        {"error": {"message": sentence, "type": kind, "param": None, "code": status}}, status
    )


def has_key(args: Any) -> bool:
    """Whether vLLM asks for an API key under `PATH`. args: of the command line of `vllm serve`."""
    asks = PATH.startswith(authenticate.GUARDED_PREFIX)
    return asks and any(args.api_key or [envs.VLLM_API_KEY])


def closed(vllm_config: Any, args: Any) -> Refused | None:
    """Why the routes of a server don't answer, if they don't."""
    if not capacity_config(vllm_config.additional_config).enabled:
        return Refused(404, "this server was started without --moe-capacity-mode.")
    if not has_key(args) and not args.uds and not _is_loopback(args.host):
        return Refused(
            403,
            f"this server listens on {args.host or 'every address'} without an API key: --api-key, "
            "or --host 127.0.0.1, is accepted for live control.",
        )
    return None


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


class ControlPlugin:
    """What `vllm.endpoint_plugins` asks for."""

    name = "capmoe_control"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        if engine_client is None:  # a server that only renders
            return
        refused = closed(engine_client.vllm_config, args)
        control = Control(engine_client, refused, has_key(args) or bool(args.uds))
        if control.closed is not None:
            logger.warning("MoE capacity: no live control, %s", control.closed)
        setattr(state, STATE, control)
