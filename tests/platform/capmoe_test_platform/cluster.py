"""The platform. Importing this fails where vLLM's own isn't as expected."""

from vllm.platforms.cpu import CpuPlatform


def expect(condition: bool, what: str) -> None:
    """Raise unless vLLM is what this platform was written for (0.32 and 0.33)."""
    if not condition:
        raise RuntimeError(
            f"capmoe_test_platform: {what}. vLLM has changed: see whether its own CPU platform "
            "does this now, and else mend tests/platform."
        )


expect(CpuPlatform.ray_device_key == "", "CpuPlatform knows Ray by itself")
expect(
    CpuPlatform.get_device_communicator_cls().endswith(".cpu_communicator.CpuCommunicator"),
    "CpuPlatform has another communicator",
)


class ClusterPlatform(CpuPlatform):
    """The CPU platform with a complete communicator; Ray takes a rank for a (logical) GPU.

    The Ray cluster must be started with as many: `ray start --head --num-gpus=2`.
    """

    ray_device_key = "GPU"

    @classmethod
    def device_count(cls) -> int:
        return 2

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        return "capmoe_test_platform.communicator.ClusterCommunicator"
