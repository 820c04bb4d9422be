"""Asks a server's route for live control."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

PATH = "/v1/moe-capacity"
PLUGINS = "VLLM_PLUGINS=capmoe,capmoe_control"


def ask(url: str, key: str | None, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the server answers to GET, or to a change of `values`.

    url: of the server, as `http://host:8000`. key: its API key, if it has one.

    Raises:
        ValueError: it can't be asked, or it refuses; with one sentence.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        raise ValueError(f"the URL is {url!r}, but one as http://localhost:8000 is accepted.")
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    data = None if values is None else json.dumps(values).encode()
    request = urllib.request.Request(url.rstrip("/") + PATH, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
            if "now" not in found:
                raise ValueError("its answer is another one than expected")
            return found
    except urllib.error.HTTPError as error:
        raise ValueError(_said(url, error.code, error.read())) from None
    except (OSError, ValueError, TypeError, http.client.HTTPException) as error:
        raise ValueError(f"{url} can't be asked ({getattr(error, 'reason', error)}).") from None


def _said(url: str, status: int, content: bytes) -> str:
    """The sentence of a refusal."""
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    if isinstance(error, dict) and "message" in error:
        return str(error["message"])
    if status == 401:
        return f"{url} wants another API key: --api-key, or VLLM_API_KEY, is accepted."
    if status in (404, 405):
        return f"{url} has no {PATH}: a server that was started with {PLUGINS} has it."
    return f"{url} answered with status {status}."
