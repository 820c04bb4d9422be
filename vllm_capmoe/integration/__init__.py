"""The vLLM side of the plugin, and the only part of the package that imports vLLM.

register        what the entry point `vllm.general_plugins` calls, in every vLLM process
engine_args     flags, keywords and additional_config
settings        where the settings stand in vLLM's configuration
checks          refuses what can't be served; layer_checks: what only a layer shows
worker          a worker starts: activate the rest if a mode is on
front_end       an engine is made: what its process needs, also where Ray Serve sent its settings
required        for `worker_extension_cls`: no worker without this package
families        which routers are served, how each scores
router          capacity behind vLLM's router          step      decode tokens, request ids
experts         our experts as a vLLM kernel           stats     counters on the device
layers          binds the loaded model's layers        metrics   Prometheus series, log
placement       where experts live                     rpc       what a worker answers
isolation       what scope `request` refuses           compile_cache    vLLM's keys of graphs
kernels         what vLLM's own kernels do with dropped assignments
proof           every process has the same plugin and settings, or none serves
compat          supported versions, and how vLLM is patched
readings        what is read of vLLM, and what to do when it has moved
"""

import functools


@functools.cache
def register() -> None:
    """Make vLLM know the capacity arguments. Safe to call more than once.

    With mode `off` nothing else happens. `LLM(moe_capacity_mode=...)` needs this call first, since
    vLLM loads its plugins only after it has taken the keywords.

    On a vLLM that lacks what this hangs on, nothing is patched but the refusal of a mode.
    """
    from vllm_capmoe.integration import compat, engine_args, front_end, proof, worker

    try:
        compat.apply(engine_args.patches, worker.patches, proof.core_patches, front_end.patches)
    except compat.IncompatibleVLLMError as error:
        engine_args.refuse_modes(error)
