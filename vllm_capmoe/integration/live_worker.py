"""Settings that change while an engine serves: what a worker does.

Methods of a worker, beside those of rpc.py:

    moe_capacity_settings()    what is in effect
    moe_capacity_check()       what a change would do, and changes nothing
    moe_capacity_change()      do it

They must find the worker between two steps, and keys and values that were computed by other
settings must not be used again: live_engine.py sees to both.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.integration.layers import moe_layers
from vllm_capmoe.integration.rpc import has_graphs, refuse_graphs
from vllm_capmoe.layer_settings import layer_number, shown
from vllm_capmoe.live import Live, differences

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from capmoe_kernels.contract import Plan
    from vllm_capmoe.integration.router import CapacityRouter

logger = init_logger("vllm.capmoe")


class LiveWorker:
    """The methods of one worker, and what is in effect in it."""

    def __init__(self, config: CapacityConfig, vllm_config: "VllmConfig"):
        self.now, self.vllm_config = Live.of(config), vllm_config

    def moe_capacity_settings(self) -> dict[str, Any]:
        """What the engine was started with, and what is in effect, as plain JSON values."""
        return {"started": self.now.started.to_dict(), "now": self.now.to_dict()}

    def moe_capacity_check(self, values: dict[str, Any]) -> dict[str, Any]:
        """What would be `new`, how many layers `takes` that, and the `error`, if it can't be.

        values: some of `vllm_capmoe.live.KEYS`, as they are to be. An error is one sentence; not
        raised, since it would lose its type and its form on the way to a front end. A layer takes a
        change unless it has settings of its own for all that differs.
        """
        try:
            changed = self._changed(values)
            self._plans(changed)
            new = differences(self.now.to_dict(), changed.to_dict())
            layers = [layer_number(layer.layer_name) for layer in moe_layers(self.vllm_config)]
            takes = sum(changed.reaches(number, self.now) for number in layers)
            return {"new": new, "takes": takes, "error": None}
        except ValueError as error:
            return {"new": "", "takes": 0, "error": str(error)}

    def moe_capacity_change(self, values: dict[str, Any]) -> dict[str, Any]:
        """Change the layers of this worker from the next step on, and return what is in effect.

        Raises:
            ValueError: `moe_capacity_check` says why; nothing has changed.
        """
        new = self._changed(values)
        for router, plan in self._plans(new):
            router.change(plan, new.observe and not new.started.observe)
        old, self.now = self.now, new
        if get_tensor_model_parallel_rank() == 0 and old != new:
            logger.info("MoE capacity changed: %s", differences(old.to_dict(), new.to_dict()))
        return new.to_dict()

    def _changed(self, values: dict[str, Any]) -> Live:
        new = self.now.changed(values)
        if new.observe != self.now.observe:
            refuse_graphs(f"observe is {shown(new.observe)}", self.vllm_config)
        return new

    def _plans(self, new: Live) -> "list[tuple[CapacityRouter, Plan]]":
        """The routers that would route otherwise, each with its new plan.

        Raises:
            ValueError: a layer has no room for it.
        """
        found = []
        for layer in moe_layers(self.vllm_config):
            number, router = layer_number(layer.layer_name), layer.router
            own, started = new.for_layer(number), new.started.for_layer(number)
            gamma, keeps = own.gamma, own.keeps(router.top_k)
            if own.mode == "off" or started.gamma is None:
                gamma = None
            if len(keeps) > len(started.keeps(router.top_k)):
                raise ValueError(
                    f"decode_keep is {shown(own.decode_keep)}, but layer {number} was started with "
                    f"all {router.top_k} experts kept: {router.top_k} or 'off' is accepted."
                )
            parallel = layer.moe_config.moe_parallel_config
            gathers = parallel.dp_size * parallel.sp_size > 1
            if own.mode == "expanded" and (gathers or has_graphs(self.vllm_config)):
                _refuse_more_room(own, started)
            plan = dataclasses.replace(router.plan, gamma=gamma, keeps=keeps)
            if plan != router.plan or new.observe != self.now.observe:
                found.append((router, plan))
        return found


def _refuse_more_room(own: CapacityConfig, started: CapacityConfig) -> None:
    """Buffers are made for what the experts of a rank can hold of all ranks' rows at the start's
    factor: those of captured graphs, and those for rows of engines that may not have changed yet.
    """
    if own.gamma is not None and started.gamma is not None and own.gamma > started.gamma:
        raise ValueError(
            f"factor is {own.factor}, but in mode 'expanded' the buffers of this engine (of CUDA "
            f"graphs, or for rows of several ranks) were made for {started.factor}: up to that, "
            "'inf' and mode 'off' are accepted."
        )
