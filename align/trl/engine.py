"""A user's model, made ready to take packed lists through its own forward."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from align.errors import UserError
from align.model.attach import REFERENCE as COPY
from align.model.attach import adapter_layers, adapter_state
from align.model.forward import base_model, evaluating, logprobs, score_tokens
from align.model.fusing import enable_fusing, has_foreign_forward
from align.model.packing import enable_packing
from align.packing import packed_collate
from align.packing.batch import Example, collate
from align.packing.rope import fix_frequencies
from align.types import ListBatch

log = logging.getLogger("align")

REFERENCE = "ref"
"""TRL's name of the copy of an adapter that training starts from."""


class Engine:
    """Runs lists through a model's own forward, so that wrappers and hooks around it see every pass."""

    def __init__(self, model: nn.Module, *, trainer: str, read: Callable[..., Any] = logprobs) -> None:
        """Args:
        trainer: the class whose remedy an error names.
        read: what must stay the same: log-probabilities of a language model, rewards of a classifier.

        Raises:
            UserError: an adapter that prepends virtual tokens.
        """
        if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
            raise UserError(
                f"{type(model.active_peft_config).__name__} puts virtual tokens before every row, which packed rows "
                f"cannot have; use trl.{trainer} for it"
            )
        base = base_model(model)
        name = base.config._name_or_path or type(base).__name__
        _tell_patched(base, name)
        keep_four_bits_trainable(base, name)
        devices = [base.device] if base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            fix_frequencies(base, name=name)
            self.packing = enable_packing(base, name=name, read=read)
            enable_fusing(model, name=name, read=read)
        take_lists(base, score_tokens if read is logprobs else read)
        self.model, self.pad_id = model, base.config.get_text_config().pad_token_id or 0
        self.layers = adapter_layers(model)
        known = model.peft_config if isinstance(model, PeftModel) else {}
        self.copy = next((name for name in (REFERENCE, COPY) if name in known), None)

    def collate(self, lists: Sequence[Example], device: torch.device) -> ListBatch:
        """Lists as the model reads them."""
        batch = packed_collate(lists) if self.packing else collate(lists, pad_id=self.pad_id)
        return batch.to(device)

    def score(self, model: nn.Module, batch: ListBatch, outputs: tuple[str, ...] = ()) -> Any:
        """What the model says of every learnt token (see align.model.forward), or a classifier of every completion.

        Args:
            model: this one, however wrapped.
        """
        return model(align_batch=batch, align_outputs=outputs)

    @contextmanager
    def start(self, name: str | None = None) -> Iterator[None]:
        """Inside, an adapter is what it was before training: off, or its copy.

        Args:
            name: of another adapter that is active instead.
        """
        name = name or self.copy
        state: Any = {"_active_adapter": [name]} if name else {"_disable_adapters": True}
        with (
            evaluating(self.model),
            torch.no_grad(),
            adapter_state(self.layers, **state) if self.layers else nullcontext(),
        ):
            yield

    def checkpoint_all_but_last(self) -> None:
        """The last layer computes only rows that are asked for, which is not known when it would compute again."""
        layers = [m for m in base_model(self.model).modules() if isinstance(m, GradientCheckpointingLayer)]
        if layers and layers[-1].gradient_checkpointing:
            layers[-1].gradient_checkpointing = False


def take_lists(base: nn.Module, score: Callable[..., Any]) -> None:
    """Let `base(align_batch=..., align_outputs=...)` score lists; every other call is as it was."""
    plain: Any = base.forward
    if hasattr(plain, "takes_lists"):
        return

    @functools.wraps(type(base).forward)  # generate reads the signature
    def forward(
        self: Any, *args: Any, align_batch: Any = None, align_outputs: Any = ("logprob",), **kwargs: Any
    ) -> Any:
        if align_batch is None:
            return plain(*args, **kwargs)
        return score(self, align_batch, *([align_outputs] if align_outputs else []))

    forward.takes_lists = True  # type: ignore[attr-defined]
    base.forward = MethodType(forward, base)  # type: ignore[method-assign]


def keep_four_bits_trainable(base: nn.Module, name: str) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a CPU's inference, which gives nothing a gradient any more.

    It does so whenever a layer runs in eval mode: our look at a model before training, an evaluation in between.

    Raises:
        UserError: it has done so already.
    """
    module: Any  # bitsandbytes' own layer
    for module in base.modules():
        if not getattr(module, "support_avx512bf16_for_cpu", False):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise UserError(
                f"{name}: its 4-bit weights were packed for inference when it ran in eval mode; load it anew"
            )
        module.support_avx512bf16_for_cpu = False


def _tell_patched(base: nn.Module, name: str) -> None:
    """Say which parts another program gave a forward, since ours do not stand in for those."""
    patched = {type(module).__name__ for module in base.modules() if _is_patched(module)}
    if patched:
        log.warning(
            "%s: %s run by another library's forward, not by Align's fused ones", name, ", ".join(sorted(patched))
        )


def _is_patched(module: nn.Module) -> bool:
    """Whether a module's forward is another library's: put into its class or the module, or compiled as a whole."""
    own: Any = vars(module).get("forward")
    if hasattr(own, "takes_lists"):
        return False
    holder = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    written = getattr(vars(holder)["forward"], "__module__", None) or ""
    return has_foreign_forward(module) or written != holder.__module__ or written.startswith("unsloth_compiled_cache")
