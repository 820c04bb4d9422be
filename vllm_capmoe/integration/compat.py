"""Which vLLM we run beside, and how we touch it.

Every patch of vLLM goes through `wrap`, which refuses a symbol that is missing or whose parameters
are not the ones we were written against. So a vLLM that has moved on gives a clear error where a
capacity mode is asked for, never a patch that silently does nothing.
"""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

from packaging.version import Version

SUPPORTED = ((0, 32), (0, 33))
SUPPORTED_TEXT = "0.32 and 0.33"
_MARK = "__capmoe_wrapped__"

Function = Callable[..., Any]


class IncompatibleVLLMError(RuntimeError):
    """A capacity mode was asked for on a vLLM that this plugin doesn't know."""


def vllm_version() -> str:
    """The version of the vLLM that is imported here, e.g. "0.32.0"."""
    import vllm

    version = getattr(vllm, "__version__", "") or importlib.metadata.version("vllm")
    return str(version)


def check_version() -> None:
    """Raise `IncompatibleVLLMError` unless vLLM's minor release is one we support."""
    version = vllm_version()
    if Version(version).release[:2] not in SUPPORTED:
        raise IncompatibleVLLMError(
            f"--moe-capacity-mode needs vLLM {SUPPORTED_TEXT}, but vLLM {version} is installed: "
            "install a supported vLLM, or leave the mode off."
        )


def wrap(
    owner: Any, name: str, make: Callable[[Function], Function], *, parameters: tuple[str, ...]
) -> None:
    """Replace `owner.name` by `make(original)`, once.

    Args:
        owner: a module or a class of vLLM.
        name: the attribute; a function, method, staticmethod or classmethod.
        make: takes the original (for a classmethod: its plain function) and returns what replaces
            it. It must pass everything through where the capacity mode is off.
        parameters: names that the original must accept; this is what the replacement relies on.

    Raises:
        IncompatibleVLLMError: the attribute or one of the parameters isn't there.
    """
    where = f"{getattr(owner, '__module__', '')}.{owner.__name__}.{name}".lstrip(".")
    try:
        raw = inspect.getattr_static(owner, name)
    except AttributeError:
        raise IncompatibleVLLMError(f"vLLM {vllm_version()} has no {where}: {_ADVICE}") from None
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    original = raw.__func__ if kind else raw
    if getattr(original, _MARK, False):
        return
    known = inspect.signature(original).parameters
    missing = [parameter for parameter in parameters if parameter not in known]
    if missing:
        raise IncompatibleVLLMError(
            f"{where} of vLLM {vllm_version()} takes {list(known)}, without {missing}: {_ADVICE}"
        )
    replacement: Any = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, True)
    setattr(owner, name, kind(replacement) if kind else replacement)


_ADVICE = f"this release of vllm-capmoe knows vLLM {SUPPORTED_TEXT}; leave --moe-capacity-mode off."
