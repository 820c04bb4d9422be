"""The communicator: collectives over rows whose number differs by rank, made of gloo's even ones.

Imported when vLLM makes its first group of ranks, since its base class needs the chosen platform.
"""

import inspect

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from capmoe_test_platform.cluster import expect

for _name in ("all_gatherv", "reduce_scatterv"):
    _parameters = ["self", "input_", "dim", "sizes"]
    _known = getattr(DeviceCommunicatorBase, _name, None)
    expect(
        _known is not None and list(inspect.signature(_known).parameters) == _parameters,
        f"DeviceCommunicatorBase.{_name} doesn't take {_parameters}",
    )
    expect(_name not in vars(CpuCommunicator), f"CpuCommunicator has its own {_name}")


class ClusterCommunicator(CpuCommunicator):
    def all_gatherv(
        self, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> Tensor | list[Tensor]:
        """All ranks' rows, in the order of the ranks: [sum(sizes), ...] of [own size, ...]."""
        expect(dim == 0, "rows are gathered along another dimension than the first")
        if isinstance(input_, list):
            return [self._gather(each, sizes) for each in input_]
        return self._gather(input_, sizes)

    def _gather(self, rows: Tensor, sizes: list[int] | None) -> Tensor:
        sizes = sizes or [rows.shape[0]] * self.world_size
        longest = max(sizes)
        filled = pad(rows, [0, 0] * (rows.dim() - 1) + [0, longest - rows.shape[0]]).contiguous()
        everyone = filled.new_empty((self.world_size * longest, *rows.shape[1:]))
        dist.all_gather_into_tensor(everyone, filled, group=self.device_group)
        parts = zip(everyone.split(longest), sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts])

    def reduce_scatterv(
        self, input_: Tensor, dim: int = -1, sizes: list[int] | None = None
    ) -> Tensor:
        """The sum over all ranks, cut to this rank's rows: [own size, ...] of [sum(sizes), ...]."""
        expect(dim == 0, "rows are scattered along another dimension than the first")
        sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
        expect(sum(sizes) == input_.shape[0], f"{sizes} don't add up to {input_.shape[0]} rows")
        total = input_.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.device_group)
        return total.split(sizes)[self.rank_in_group].clone()
