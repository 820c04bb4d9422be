"""A worker process starts: here, and only with a mode other than `off`, vLLM is changed.

Order in a worker: the plugin is registered; the worker object is made (`activate`, before anything
of the model exists); the model is built and loaded, with our routers and experts in it; then
`layers.bind` tells each router what only the finished model shows.
"""

import functools
from typing import TYPE_CHECKING, Any

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration import checks, compat, proof, readings
from vllm_capmoe.integration.compat import Function, Patch
from vllm_capmoe.integration.settings import capacity_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def patches() -> list[Patch]:
    """What looks at the configuration whenever a worker is made.

    vllm.v1.worker.worker_base.WorkerBase.__init__: every worker class calls it first, in every
        executor. It can go once vLLM passes its configuration to general plugins.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    return [Patch(WorkerBase, "__init__", _activate_first, ("vllm_config",))]


def _activate_first(original: Function) -> Function:
    def __init__(self: Any, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        config = capacity_config(vllm_config.additional_config)
        if config.enabled:
            activate(self, config)

    return __init__


def activate(worker: Any, config: CapacityConfig) -> None:
    """Install the execution-path patches and give `worker` its extra methods.

    The methods are those of rpc.py and of live_worker.py, and `moe_capacity_proof()`, which is
    asked before the first request, see `proof`.
    """
    readings.check(readings.OF_CONFIGURATION, readings.OF_WORKERS)
    checks.check_environment(config)
    checks.check_engine(config, worker.vllm_config)

    from vllm_capmoe.integration import (
        compile_cache,
        custom_ops,
        experts,
        kernels,
        layer_checks,
        layers,
        live_worker,
        router,
        rpc,
        step,
    )

    vllm_config = worker.vllm_config
    custom_ops.register()
    compat.apply(
        router.patches,
        experts.patches,
        kernels.patches,
        layer_checks.patches,
        step.patches,
        compile_cache.patches,
    )

    load_model = worker.load_model

    def load_model_and_bind(*args: Any, **kwargs: Any) -> Any:
        result = load_model(*args, **kwargs)
        runner = worker.model_runner
        layers.bind(config, vllm_config, runner, step.attach(runner, vllm_config))
        experts.open_weights_for(worker, layers.moe_layers(vllm_config))
        return result

    def moe_capacity_proof() -> proof.Proof:
        return proof.proof(config, layers.num_asked(config, vllm_config))

    worker.load_model = load_model_and_bind
    worker.moe_capacity_proof = moe_capacity_proof
    for method in rpc.METHODS:
        setattr(worker, method.__name__, functools.partial(method, vllm_config))
    live = live_worker.LiveWorker(config, vllm_config)
    worker.moe_capacity_settings = live.moe_capacity_settings
    worker.moe_capacity_check = live.moe_capacity_check
    worker.moe_capacity_change = live.moe_capacity_change
