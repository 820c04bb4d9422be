"""Our own version."""

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """The installed version, or "0.0.0" when run from a source tree that is not installed."""
    try:
        return version("vllm-capmoe")
    except PackageNotFoundError:
        return "0.0.0"
