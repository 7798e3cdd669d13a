"""Which modules of a model run as fused operations, and which of its last layer only where a loss looks."""

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from align.errors import UserError
from align.fused import ACTIVATIONS, Activation, Projection, gated_mlp, lora_linear, on_asked_rows, rms_norm
from align.model.forward import base_model, evaluating, logprobs
from align.model.load import first_line
from align.model.probe import probe_lists, tolerance
from align.model.sharding import whole
from align.packing.batch import collate
from rewards.logits import decoder_of

log = logging.getLogger(__name__)

ROWWISE = ("self_attn.q_proj", "self_attn.o_proj", "mlp")
"""Modules of a decoder layer that treat every position alone and of which nothing but the output's rows is read."""


def enable_fusing(model: nn.Module, *, name: str, read: Callable[..., Tensor] = logprobs) -> bool:
    """Give a model's LoRA layers and gated blocks their fused forms, if it is then the same model.

    Args:
        read: what must stay the same: a function of the model and a batch.

    Modules get a `forward` of their own; their classes, parameters and names stay as they are.

    Returns:
        Whether it is; if not, the model is left as it was, and one line says why.
    """
    methods = fused_methods(model)
    base = base_model(model)
    batch = collate(probe_lists(base), pad_id=0).to(base.device)
    with evaluating(model), torch.no_grad():
        try:
            expected = read(model, batch)
        except Exception as error:  # the base model runs, so it is what an adapter makes of some layer
            raise UserError(
                f"policy.adapter: it does not run in {name} ({base.config.model_type}): {first_line(error)}; name "
                "other `targets`, such as [q_proj, v_proj]"
            ) from error
        for module, method in methods.items():
            module.forward = MethodType(method, module)
        try:
            difference = (read(model, batch) - expected).abs().max().item()
            problem = f"their results differ by {difference:.2g}"
            same = difference <= tolerance(base.dtype)
        except Exception as error:  # whatever a model's own code makes of it
            same, problem = False, first_line(error)
    if not same:
        for module in methods:
            del module.forward
        log.warning("%s: layers run as they are, since fused %s", name, problem)
    return same


def fused_methods(model: nn.Module) -> dict[nn.Module, Callable[..., Tensor]]:
    """Every module that is to run otherwise, and how; not those that another program gave a forward of their own."""
    methods: dict[nn.Module, Callable[..., Tensor]] = {}
    for module in model.modules():
        if _is_lora(module):
            methods[module] = _lora_forward
        elif _is_gated(module) and (activation := _activation(module.act_fn)):
            methods[module] = _mlp_forward(activation)
        elif type(module).__name__.endswith("RMSNorm") and (norm := _norm(module)):
            methods[module] = norm
    layers: Any = getattr(decoder_of(base_model(model)), "layers", None)
    for path in ROWWISE if layers else ():
        if (rowwise := _submodule(layers[-1], path)) is not None:
            methods[rowwise] = on_asked_rows(methods.get(rowwise, type(rowwise).forward))
    return {module: method for module, method in methods.items() if not has_foreign_forward(module)}


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether someone else gave a module, not its class, a forward: Unsloth, a hook of accelerate, a user."""
    own = vars(module).get("forward")
    ours = isinstance(own, MethodType) and (own.__module__ or "").startswith("align.")
    return own is not None and not ours


def _submodule(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _is_lora(module: Any) -> bool:
    return type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear


def _is_gated(module: Any) -> bool:
    parts = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    return hasattr(module, "act_fn") and all(type(part) is nn.Linear or _is_lora(part) for part in parts)


def _activation(function: Any) -> Activation | None:
    """The one of ours that gives the same values."""
    x = torch.linspace(-6, 6, 97)
    return next((a for a in ACTIVATIONS.values() if torch.equal(function(x), a.forward(x))), None)


def _norm(module: Any) -> Callable[..., Tensor] | None:
    """The module's values as a fused norm, its weight as it is or, as Gemma's, less one."""
    eps, weight = getattr(module, "variance_epsilon", getattr(module, "eps", None)), getattr(module, "weight", None)
    if eps is None or weight is None or weight.requires_grad:
        return None
    x = torch.linspace(-2, 3, 2 * len(weight), device=weight.device).view(2, -1).square()
    weight = whole(weight)  # which is little
    expected = torch.func.functional_call(module, {"weight": weight}, x)
    for offset in (0.0, 1.0):
        if torch.allclose(rms_norm(x, offset + weight, eps), expected, rtol=1e-5, atol=1e-6):
            return _norm_forward(offset, eps)
    return None


def _norm_forward(offset: float, eps: float) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or self.weight.requires_grad:  # half precision is normalised in float32
            return type(self).forward(self, x)
        return rms_norm(x, offset + self.weight if offset else self.weight, eps)

    return forward


def _lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    projection = _projection(self)
    if projection is None or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    return lora_linear(_in_compute_dtype(x), projection)


def _mlp_forward(activation: Activation) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up, down = (_projection(part) for part in (self.gate_proj, self.up_proj, self.down_proj))
        if gate is None or up is None or down is None or gate.bias is not None or down.bias is not None:
            return type(self).forward(self, x)
        return gated_mlp(_in_compute_dtype(x), gate, up, down, activation)

    return forward


def _projection(layer: Any) -> Projection | None:
    """A linear layer as it is now, with the adapter that is switched on; None where that is more than two factors."""
    if type(layer) is nn.Linear:
        return Projection(layer.weight, layer.bias)
    base = layer.get_base_layer()
    plain = Projection(base.weight, base.bias)
    if layer.disable_adapters:
        return None if layer.merged else plain
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or not active:
        return plain
    if len(active) > 1 or active[0] in layer.lora_variant or layer.lora_bias[active[0]]:
        return None
    dropout = layer.lora_dropout[active[0]]
    if layer.training and not isinstance(dropout, nn.Identity):
        return None
    a, b = layer.lora_A[active[0]].weight, layer.lora_B[active[0]].weight
    return plain._replace(a=a, b=b, scale=layer.scaling[active[0]])


def _in_compute_dtype(x: Tensor) -> Tensor:
    """In autocast's dtype where that is on; cast once for all the layers that read one tensor."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if x.dtype == dtype:
        return x
    if not hasattr(x, "in_compute_dtype"):
        x.in_compute_dtype = x.to(dtype)  # type: ignore[attr-defined]
    return x.in_compute_dtype  # type: ignore[attr-defined]
