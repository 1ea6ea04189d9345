"""Networks cut up among processes (FSDP2, arXiv 2304.11277): each holds a part of every weight, and all of a layer's only while it is at work."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sfumato.diffusion.unet import ResnetBlock, SpatialTransformer
from sfumato.nn.attention import Attention
from sfumato.nn.layers import MLP

PARTS = (Attention, MLP, ResnetBlock, SpatialTransformer)  # whose weights are gathered together


class Shards:
    """The processes that share networks, and what the networks look like whole."""

    def __init__(self, device: torch.device, world: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.mesh = init_device_mesh(device.type, (world,))
        self.empty: dict[str, nn.Module] = {}

    def cut(self, *sets: dict[str, nn.Module]) -> None:
        """Leaves this process its part of each network, in place."""
        from torch.distributed.fsdp import fully_shard

        for networks in sets:
            for name, network in networks.items():
                if name not in self.empty:
                    self.empty[name] = copy.deepcopy(network).to("meta")
                single = {p for p in network.parameters() if not p.ndim}  # which cannot be cut: each process has them
                for part in network.modules():
                    if isinstance(part, PARTS):
                        fully_shard(part, mesh=self.mesh, ignored_params=single)
                fully_shard(network, mesh=self.mesh, ignored_params=single)

    def joined(self, networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Whole copies, on the CPU. All processes must ask together."""
        for name, network in networks.items():
            self.empty[name].load_state_dict({k: whole(v).cpu() for k, v in network.state_dict().items()}, assign=True)
        return {name: self.empty[name] for name in networks}

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        """As `clip_grad_norm_`: the norm of all gradients, which are made smaller where it is above `most`. Those of weights that are not cut are
        averaged over the processes first.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        single = [g for g in grads if not hasattr(g, "full_tensor")]
        for g in single:
            torch.distributed.all_reduce(g)
            g /= self.mesh.size()
        norms = [whole(torch.nn.utils.get_total_norm([g for g in grads if hasattr(g, "full_tensor")])), torch.nn.utils.get_total_norm(single)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        share = min(1.0, most / (float(norm) + 1e-6))
        for g in grads:
            g.mul_(share)
        return norm


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process has a part, in one; others as they are. All processes must ask together."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]
