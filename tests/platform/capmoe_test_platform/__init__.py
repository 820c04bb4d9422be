"""vLLM's CPU platform with what several ranks need, for tests and benchmarks only.

The CPU platform of vLLM 0.32 and 0.33 lacks two things that multi-rank engines use:

- `CpuCommunicator` has no `all_gatherv` and no `reduce_scatterv`, which data parallel experts need;
- it says that it doesn't support Ray, although Ray schedules whatever resources it is told of.

This folder is a distribution in the form in which pip leaves one on disk. It isn't installed: the
tests put `tests/platform` on PYTHONPATH of the processes they start, and vLLM finds the entry
point `vllm.platform_plugins` of the `.dist-info` folder there. In every other process vLLM's own
platform is in place.
"""


def activate() -> str:
    """Entry point: the platform's class. Imports nothing of vLLM, which is choosing it just now.

    An error raised here, vLLM would only log before it goes on with its own platform; one raised by
    the import of the class ends the process. So everything that can fail is there.
    """
    return "capmoe_test_platform.cluster.ClusterPlatform"
