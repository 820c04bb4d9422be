"""`worker_extension_cls="vllm_capmoe.Required"`: a worker without this package doesn't start.

For engines whose arguments are made where vLLM has loaded no plugin (Ray Serve, Ray Data): a mode
in `additional_config` is then just a dictionary to a vLLM without the plugin, which would serve
without it. vLLM imports this class in every worker, so that one fails where the package is missing.
"""

from vllm_capmoe.integration import register

register()  # also where VLLM_PLUGINS leaves it out: `checks.check_environment` then says so


class Required:
    """Adds nothing to vLLM's workers."""
