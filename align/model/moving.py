"""A reference that follows the policy (TR-DPO), averaged exactly: as weights, not as the factors of an adapter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.errors import UserError
from align.model.attach import REFERENCE, TRAINED, adapter_config, adapter_layers, plain_config

MOVING = "moving"
"""Name of the adapter that holds a reference which has left its start."""
MOVED_FILE = "moving_reference.safetensors"
"""Where a checkpoint keeps it."""


class MovingReference:
    """Moves a policy's reference towards the policy: w_ref <- mixture w + (1 - mixture) w_ref, every so many steps.

    A low-rank policy has w = w_0 + s B A, so its reference is w_0 + D with D <- mixture s B A + (1 - mixture) D. D is
    kept as two factors side by side, [mixture s B, (1 - mixture) B'] and [A; A'], which is exact; their rank grows by
    that of the adapter with every move and is held at the smaller side of the matrix, where one factor is the product
    and the other the identity.

    Source: TR-DPO, arXiv:2404.09656, eqs. 4 and 5 (a mixture of 1 is the hard update); the factors: ours.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        frozen: PreTrainedModel | None,
        *,
        every: int,
        mixture: float,
    ) -> None:
        """Args:
        model: the policy's.
        frozen: its reference as a model of its own, for full training.
        every: optimizer steps between two moves.
        mixture: share of the policy in the new reference, above 0 and at most 1.

        Raises:
            UserError: an adapter that is no sum of base weights and a product of two factors.
        """
        self.model: Any = model
        self.frozen = frozen
        self.every, self.mixture = every, mixture
        self.moved = False
        _check_additive(model)

    def after_step(self, step: int) -> None:
        """To be called when `step` optimizer steps are taken."""
        if step % self.every == 0:
            self.move()

    @torch.no_grad()
    def move(self) -> None:
        """One update."""
        self.moved = True
        if self.frozen is not None:
            for own, other in zip(self.model.parameters(), self.frozen.parameters(), strict=True):
                other.copy_(torch.lerp(other.float(), own.float(), self.mixture))
            return
        self._set_factors({name: _mixed(layer, self.mixture) for name, layer in _layers(self.model)})

    def save(self, folder: Path) -> None:
        """Write the reference where it has left its start."""
        if self.moved:
            save_file({name: value.contiguous() for name, value in self._tensors().items()}, folder / MOVED_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from `save`; without its file the reference is at its start."""
        if not (folder / MOVED_FILE).is_file():
            return
        self.moved = True
        tensors = load_file(folder / MOVED_FILE)
        if self.frozen is not None:
            for name, parameter in self.frozen.named_parameters():
                parameter.copy_(tensors[name])
            return
        self._set_factors({name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name, _ in _layers(self.model)})

    def _set_factors(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Put them into the layers as an adapter of its own, by the layer's name."""
        config = plain_config(adapter_config(self.model))
        config.inference_mode = True
        self.model.peft_config[MOVING] = config  # by which PEFT tells its weights from those that are exported
        for name, layer in _layers(self.model):
            _set_factors(layer, *(factor.to(layer.lora_A[TRAINED].weight.device) for factor in factors[name]))

    def _tensors(self) -> dict[str, Tensor]:
        if self.frozen is not None:
            return {name: parameter.detach() for name, parameter in self.frozen.named_parameters()}
        named: dict[str, Tensor] = {}
        for name, layer in _layers(self.model):
            named[f"{name}.A"], named[f"{name}.B"] = layer.lora_A[MOVING].weight, layer.lora_B[MOVING].weight
        return named


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that the trained adapter acts in."""
    return (
        (name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and TRAINED in layer.r
    )


def _mixed(layer: Any, mixture: float) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """Factors A and B of a layer's next D; see MovingReference."""
    a, b = _factors(layer, TRAINED)
    b = mixture * b
    before = next((name for name in (MOVING, REFERENCE) if name in layer.lora_A), None)
    if before is not None and mixture < 1:
        old_a, old_b = _factors(layer, before)
        a, b = torch.cat([a, old_a]), torch.cat([b, (1 - mixture) * old_b], dim=1)
    rank, (outputs, inputs) = len(a), (len(b), a.shape[1])
    if rank <= min(outputs, inputs):
        return a, b
    product = b @ a
    if outputs <= inputs:
        return product, torch.eye(outputs, dtype=product.dtype, device=product.device)
    return torch.eye(inputs, dtype=product.dtype, device=product.device), product


def _factors(layer: Any, name: str) -> tuple[Float[Tensor, "R I"], Float[Tensor, "O R"]]:
    """A, and B with the adapter's scale in it, in float32."""
    return layer.lora_A[name].weight.float(), layer.scaling[name] * layer.lora_B[name].weight.float()


def _set_factors(layer: Any, a: Float[Tensor, "R I"], b: Float[Tensor, "O R"]) -> None:
    for modules, weight in ((layer.lora_A, a), (layer.lora_B, b)):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        module.weight = nn.Parameter(weight.clone(), requires_grad=False)
        modules[MOVING] = module
    layer.lora_dropout[MOVING] = nn.Identity()
    layer.r[MOVING], layer.lora_alpha[MOVING], layer.scaling[MOVING] = len(a), len(a), 1.0
    layer.use_rslora[MOVING] = layer.lora_bias[MOVING] = False


def _check_additive(model: nn.Module) -> None:
    for layer in adapter_layers(model):
        own: Any = layer
        plain = isinstance(layer, LoraLayer) and TRAINED in own.lora_A and "lora_E" not in dict(own.named_children())
        if not plain or TRAINED in own.lora_variant or own.lora_bias.get(TRAINED):
            raise UserError(
                "reference: moving averages weights, which is exact for `full` and for adapters that add a product of "
                "two factors (lora, rslora, pissa, olora, eva, loftq), and this policy has another kind "
                f"({type(layer).__name__}); take one of these, or reference: {{name: initial}}"
            )
