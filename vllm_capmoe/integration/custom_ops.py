"""The operations that torch.compile must not look into, as custom ops of the library `capmoe`.

On a GPU vLLM hides a whole MoE layer behind an op of its own; on the CPU Dynamo traces into the
layer, and everything here that depends on values would break the graph. As custom ops with fake
implementations both platforms behave alike.
"""

import functools

from torch.library import Library
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_capmoe.integration import experts, router

_library = Library("capmoe", "FRAGMENT")  # an op lives as long as its library


@functools.cache
def register() -> None:
    """Define `torch.ops.capmoe.route`, `.observe` and `.experts`, once per process."""
    direct_register_custom_op(
        "route", router.route_op, fake_impl=router.route_fake, target_lib=_library
    )
    direct_register_custom_op(
        "observe", router.observe_op, fake_impl=router.observe_fake, target_lib=_library
    )
    direct_register_custom_op(
        "experts",
        experts.experts_op,
        mutates_args=["output"],
        fake_impl=experts.experts_fake,
        target_lib=_library,
    )
