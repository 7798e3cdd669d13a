"""Weights cut over processes by FSDP2: how they are cut, and how one that is read outside its layer is whole there."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
    disable_fsdp_ram_efficient_loading,
    parse_flag_from_env,
)
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from align.errors import UserError
from align.model.forward import base_model

M_MMAP_THRESHOLD = -3
"""Of malloc.h: blocks from this size on are the system's own, given back when freed; once set, it does not grow."""
OTHER_CUTS = ("TP", "CP", "SP")
"""Of accelerate's ParallelismConfig: tensors, contexts and sequences cut, which no loss of ours can take."""


@dataclass(frozen=True)
class Sharding:
    """How accelerate's configuration says that weights are cut, and what they are computed in."""

    mesh: DeviceMesh
    """Over processes that hold a part each; with a dimension before it, over groups that each hold all."""
    reshard: bool
    """Whether a layer's weights are dropped after its forward pass."""
    offload: bool
    """Whether each process keeps its part in the host's memory."""
    compute: torch.dtype | None
    """What weights are gathered in; gradients are summed in float32."""

    def options(self) -> dict[str, Any]:
        """As keywords of `fully_shard`. A layer's inputs stay as they are: autocast and the residual stream rule."""
        policy = MixedPrecisionPolicy(self.compute, torch.float32 if self.compute else None, cast_forward_inputs=False)
        own = {"mesh": self.mesh, "mp_policy": policy, "reshard_after_forward": self.reshard}
        return own | (
            {"offload_policy": CPUOffloadPolicy(pin_memory=self.mesh.device_type == "cuda")} if self.offload else {}
        )


def sharding_asked() -> bool:
    """Whether `accelerate launch` was given a configuration of FSDP, and there is more than one process."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP") and PartialState().num_processes > 1


def tell_accelerate(precision: str) -> None:
    """Make accelerate's state that of FSDP2, on a CPU too, where it would pass over the configuration in silence.

    Args:
        precision: as `train.precision`.

    Raises:
        UserError: the configuration asks for what is not FSDP2, or cuts more than weights.
    """
    sizes = {cut: int(os.environ.get(f"PARALLELISM_CONFIG_{cut}_SIZE", "1")) for cut in OTHER_CUTS}
    if cut := next((cut for cut, size in sizes.items() if size > 1), None):
        raise UserError(f"accelerate's configuration: parallelism_config_{cut.lower()}_size: {_REASONS[cut]}; set it 1")
    if not sharding_asked():
        return
    disable_fsdp_ram_efficient_loading()  # which gives all processes but one empty weights for their checks
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError("accelerate's configuration: FSDP version 1 is not supported; set fsdp_version: 2")
    if precision == "float16":
        raise UserError("train.precision: float16 scales its loss, which sharded weights do not; use bfloat16")
    half = {"bfloat16": "bf16"}.get(precision, "no")
    on_cpu = PartialState().device.type == "cpu"
    given: dict[str, Any] = {"dynamo_plugin": TorchDynamoPlugin(), "_from_accelerator": True}
    state = AcceleratorState(cpu=on_cpu, mixed_precision=half, **given)
    state.fsdp_plugin = plugin
    # Every Accelerator takes the kind from here again; on a GPU it becomes this one by itself.
    state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


_REASONS = {
    "TP": "an adapter's factors and the head's log-probabilities are computed on whole weights",
    "CP": "packed rows need whole sequences",
    "SP": "packed rows need whole sequences",
}


def read_sharding(precision: str) -> Sharding:
    """What accelerate's configuration asks for; see `tell_accelerate`."""
    plugin, state = AcceleratorState().fsdp_plugin, PartialState()
    compute = torch.bfloat16 if precision == "bfloat16" else None
    offload = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    return Sharding(_mesh(state), bool(plugin.reshard_after_forward), offload, compute)


def _mesh(state: PartialState) -> DeviceMesh:
    if not parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return init_device_mesh(state.device.type, (state.num_processes,), mesh_dim_names=("dp_shard",))
    sizes = ParallelismConfig()
    shape = (sizes.dp_replicate_size, sizes.dp_shard_size)
    if shape[0] * shape[1] != state.num_processes:
        raise UserError(
            f"accelerate's configuration: {shape[0]} replicas of {shape[1]} shards are not {state.num_processes} "
            "processes; set parallelism_config_dp_replicate_size and parallelism_config_dp_shard_size"
        )
    return init_device_mesh(state.device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def shard(root: nn.Module, sharding: Sharding) -> None:
    """Cut a scorer's weights: every layer of its model by itself, all else (embedding, last norm, head) together.

    All else is gathered when the scorer is called and kept until the end of its backward pass, so the head's weight is
    whole wherever the scorer's own code reads it.
    """
    if sharding.mesh.device_type == "cpu":
        _give_back_at_once()
    base: Any = base_model(root.model)  # type: ignore[arg-type]
    names = set(base._no_split_modules or ())
    options = sharding.options()
    for module in list(base.modules()):
        if type(module).__name__ in names:
            fully_shard(module, **options)
    fully_shard(root, **{name: value for name, value in options.items() if name != "reshard_after_forward"})


def keep_stream_exact(model: nn.Module) -> None:
    """Let the residual stream stay float32 where the embedding is gathered in half precision; autocast must be on."""
    base: Any = base_model(model)
    base.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())


def _give_back_at_once() -> None:
    """Let glibc return what a layer gathered when it is dropped: else it keeps and scatters most of it (measured: twice
    the peak in full training)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option:
        set_option(M_MMAP_THRESHOLD, 2**17)


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Inside, what no layer holds (embedding, last norm, head) is whole, so that code beside the scorer may read it or
    call the model itself; every process must enter, and run as many forward passes as the others.

    Args:
        root: the policy's scorer, sharded or not.
    """
    if not isinstance(root, FSDPModule):
        yield
        return
    root._get_fsdp_state()._lazy_init()  # else the first layer that runs would take itself for the root
    root.unshard()
    try:
        yield
    finally:
        root.reshard()


def at_rest(root: nn.Module | None) -> None:
    """Drop what the last forward pass has left whole, so that the parameters are those that train, each a part."""
    if isinstance(root, FSDPModule):
        root.reshard()


def is_sharded(root: nn.Module) -> bool:
    """Whether weights are cut, so that every process must run as many forward passes as the others."""
    return isinstance(root, FSDPModule)


def agreed(count: int, root: nn.Module) -> int:
    """The largest count of any process, where weights are sharded: how many forward passes each must run."""
    if not is_sharded(root):
        return count
    largest = torch.tensor([count], device=PartialState().device)
    distributed.all_reduce(largest, distributed.ReduceOp.MAX)
    return int(largest)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be cut, gathered on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_places(tensor: Tensor) -> tuple[slice, ...]:
    """Where in the whole tensor this process's part lies."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be cut."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
