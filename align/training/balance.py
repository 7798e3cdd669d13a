"""How a step's lists weigh on processes: what one costs before it is dealt out, and how long processes then waited."""

import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from align.data.steps import Cost
from align.model.forward import base_model
from align.model.policy import Policy

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)


def step_cost(policy: Policy) -> Cost:
    """What a list costs this model; see Cost."""
    base = base_model(policy.model)
    config = base.config.get_text_config()
    width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    if not width or not layers:
        return Cost(packed=policy.packing)
    words = config.vocab_size if policy.has_reference else 0  # a reward model has a head of a few outputs
    return Cost(pair=1 / (6 * width), head=words / (12 * width * layers), packed=policy.packing)


class Waiting:
    """The share of a step that processes wait for the slowest of them, measured where each has all gradients itself.

    A process works from the step's begin to its last own gradient, before the processes' are put together; what others
    then wait is the difference to the slowest. A sharded model puts them together in every layer, so that there is no
    such moment, and no figure.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.measured = accelerator.num_processes > 1 and accelerator.distributed_type not in SHARDED
        self.clock = _DeviceClock() if accelerator.device.type == "cuda" else _Clock()
        if self.measured:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._gradient)

    def begin_step(self) -> None:
        self.clock.begin()

    def _gradient(self, _: torch.Tensor) -> None:
        self.clock.end()

    def share(self) -> dict[str, float]:
        """`rank_wait_share`: 1 - mean / max of the processes' seconds; nothing where there is one, or it is sharded."""
        if not self.measured:
            return {}
        own = torch.tensor([self.clock.seconds()], device=self.accelerator.device)
        seconds = self.accelerator.gather(own)
        return {"rank_wait_share": float(1 - seconds.mean() / seconds.max())}


class _Clock:
    def begin(self) -> None:
        self.began = self.ended = time.monotonic()

    def end(self) -> None:
        self.ended = time.monotonic()

    def seconds(self) -> float:
        return self.ended - self.began


class _DeviceClock:
    """The same where work is queued on a GPU."""

    def __init__(self) -> None:
        self.events: Any = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def begin(self) -> None:
        for event in self.events:
            event.record()

    def end(self) -> None:
        self.events[1].record()

    def seconds(self) -> float:
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1000
