"""Which vLLM we run beside, and how we touch it.

Every patch of vLLM is a `Patch`, made by `apply`, which refuses a symbol that is missing or whose
parameters are not the ones we were written against. So a vLLM that has moved on gives a clear error
where a capacity mode is asked for, never a patch that silently does nothing.
"""

import functools
import importlib.metadata
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

SUPPORTED = ((0, 32), (0, 33))
_TEXTS = [".".join(map(str, release)) for release in SUPPORTED]
SUPPORTED_TEXT = " and ".join(filter(None, [", ".join(_TEXTS[:-1]), _TEXTS[-1]]))
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


@dataclass(frozen=True)
class Patch:
    """One replacement of an attribute of vLLM.

    owner: a module or a class of vLLM. name: the attribute; a function, method, staticmethod or
    classmethod. make: takes the original (for a classmethod: its plain function) and returns what
    replaces it; it must pass everything through where the capacity mode is off. parameters: names
    that the original must accept, which is what the replacement relies on.
    """

    owner: Any
    name: str
    make: Callable[[Function], Function]
    parameters: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"{getattr(self.owner, '__module__', '')}.{self.owner.__name__}.{self.name}".lstrip(
            "."
        )

    def original(self) -> tuple[type | None, Function]:
        """The kind of the attribute (staticmethod, classmethod or None) and its function.

        Raises:
            IncompatibleVLLMError: the attribute or one of the parameters isn't there.
        """
        try:
            raw = inspect.getattr_static(self.owner, self.name)
        except AttributeError:
            raise IncompatibleVLLMError(
                f"vLLM {vllm_version()} has no {self.where}: {_ADVICE}"
            ) from None
        kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
        function = raw.__func__ if kind else raw
        known = inspect.signature(function).parameters
        missing = [parameter for parameter in self.parameters if parameter not in known]
        if missing:
            raise IncompatibleVLLMError(
                f"{self.where} of vLLM {vllm_version()} takes {list(known)}, without {missing}: "
                f"{_ADVICE}"
            )
        return kind, function


def apply(*sources: Callable[[], list[Patch]]) -> None:
    """Make the replacements, each at most once: all of them, or none and an error.

    sources: functions that import the owners of their patches, and return the patches.

    Raises:
        IncompatibleVLLMError: one of them doesn't fit this vLLM.
    """
    try:
        patches = [patch for source in sources for patch in source()]
    except ImportError as error:
        raise IncompatibleVLLMError(f"vLLM {vllm_version()}: {error}: {_ADVICE}") from error
    for patch, (kind, function) in [(patch, patch.original()) for patch in patches]:
        if getattr(function, _MARK, False):
            continue
        replacement: Any = functools.wraps(function)(patch.make(function))
        setattr(replacement, _MARK, True)
        setattr(patch.owner, patch.name, kind(replacement) if kind else replacement)


_ADVICE = f"this release of vllm-capmoe knows vLLM {SUPPORTED_TEXT}; leave --moe-capacity-mode off."
