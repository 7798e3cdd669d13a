"""Memory of one device by part, under every way of spreading a run over devices."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from align.kernels.head.chunked import default_chunk_rows
from align.model.adapters import Full
from align.model.attach import TRAINED, adapter_tensors
from align.model.checkpoint import saved_tensors
from align.model.forward import base_model
from align.planning.activations import Activations
from align.recipe import Recipe
from align.recipe.kept import KEPT

STATES = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "adagrad": 1.0,
    "rmsprop": 1.0,
    "sgd": 0.0,
    "ademamix": 3.0,
    "lion_32bit": 1.0,
    "paged_lion_32bit": 1.0,
    "paged_adamw_32bit": 2.0,
    "paged_ademamix_32bit": 3.0,
    "rmsprop_bnb_32bit": 1.0,
    "rmsprop_bnb": 1.0,
    "stable_adamw": 2.0,
}
"""Optimizer -> numbers of the parameter's dtype that it keeps for each; adafactor is counted by rows and columns."""
BY_NAME = {name: numbers for (_, name), numbers in reversed(KEPT.items())}
"""Of all others what a small matrix keeps, the first source's where several have the name."""
EIGHT_BIT = {"adamw_torch_4bit": 1.0, "lion_8bit": 1.0, "paged_lion_8bit": 1.0, "rmsprop_bnb_8bit": 1.0}
"""Optimizers of small states -> bytes for each parameter; 2 where the table does not name one."""
EIGHT_BIT_DEFAULT = 2.0
BUCKET_NUMBERS = 5e8
"""DeepSpeed's reduce_bucket_size and stage3_prefetch_bucket_size, where its configuration says `auto`, at most."""
CONTEXT_BYTES = 600 * 2**20
"""CUDA's own on a device: its context and the libraries' workspaces."""


class Model(NamedTuple):
    """Bytes of a model, none of whose weights is there."""

    frozen: int
    """With the buffers, among them an adapter's fixed factors."""
    trained: int
    numbers: int
    """Trained parameters."""
    largest: int
    """The largest trained parameter."""
    block: int
    """What is gathered at once of a sharded model: its largest layer."""
    root: int
    """What a sharded model gathers for the whole pass: embedding, head and last norm."""
    states: int
    """What the optimizer keeps."""
    saved: int
    """Of a checkpoint, without the reference and the optimizer's states."""
    exported: int
    """What is exported: the trained weights, or the adapter as PEFT holds it."""
    copy: int
    """The reference, where it is held beside the policy."""
    vocabulary: int
    width: int
    head_trains: bool
    quantized: bool


def of_model(model: Any, recipe: Recipe, *, needs_reference: bool) -> Model:
    """The bytes of a model on the meta device, as the recipe trains it."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    layers = [m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "Layer", "Block"))]
    block = max((sum(map(_bytes, layer.parameters())) for layer in layers), default=0)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    frozen = [_frozen_bytes(p, recipe) for p in parameters if not p.requires_grad]
    exported = sum(map(_bytes, adapter_tensors(model, TRAINED).values())) if isinstance(model, PeftModel) else 0
    base = base_model(model)
    output: Any = base.get_output_embeddings() or base.get_input_embeddings()
    return Model(
        frozen=sum(frozen) + sum(map(_bytes, model.buffers())),
        trained=sum(map(_bytes, trained)),
        numbers=sum(p.numel() for p in trained),
        largest=max(map(_bytes, trained), default=0),
        block=block,
        root=sum(_bytes(p) for p in parameters if id(p) not in inside),
        states=optimizer_bytes(trained, recipe.train.optimizer.name),
        saved=sum(map(_bytes, saved_tensors(model).values())),
        exported=exported or sum(map(_bytes, trained)),
        copy=_reference_copy(recipe, sum(map(_bytes, parameters)), exported, needs_reference),
        vocabulary=output.weight.shape[0] if recipe.task != "reward" else 0,
        width=output.weight.shape[1],
        head_trains=any(p is output.weight for p in trained),
        quantized=recipe.policy.quantization is not None,
    )


def _bytes(parameter: Any) -> int:
    return int(parameter.numel() * parameter.element_size())


def _frozen_bytes(parameter: Any, recipe: Recipe) -> int:
    """4-bit weights of linear layers take half a byte, and a float32 scale for each 64 of them."""
    if recipe.policy.quantization is None or parameter.ndim != 2:
        return _bytes(parameter)
    return int(parameter.numel() * (0.5 + 4 / 64))


def optimizer_bytes(trained: list[Any], name: str) -> int:
    """What an optimizer keeps of these parameters after its first step."""
    if name == "adafactor":
        return sum(_factored(p) * p.element_size() for p in trained)
    if name in STATES:
        return int(STATES[name] * sum(map(_bytes, trained)))
    if name in EIGHT_BIT or "bit" in name:
        return int(EIGHT_BIT.get(name, EIGHT_BIT_DEFAULT) * sum(p.numel() for p in trained))
    return int(BY_NAME.get(name, 2.0) * sum(map(_bytes, trained)))


def _factored(parameter: Any) -> int:
    """Adafactor's second moments: of a matrix its rows' and its columns', of a vector each number's."""
    if parameter.ndim < 2:
        return int(parameter.numel())
    return int(parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2])


def _reference_copy(recipe: Recipe, whole: int, adapter: int, needs_reference: bool) -> int:
    """A frozen adapter is a plain one: of the weight's factors it holds the products."""
    if recipe.policy.start_adapter is not None or recipe.policy.adapter.moves_start():
        return adapter
    moving = recipe.reference.name == "moving"
    if not isinstance(recipe.policy.adapter, Full) or recipe.task == "reward":
        return adapter if moving else 0
    return whole if moving or (needs_reference and not recipe.reference.cache) else 0


def workspace(model: Model, rows: int, *, device: str) -> int:
    """The tile that logits pass through, and what is made of it."""
    if not model.vocabulary:
        return 0
    count = min(rows, default_chunk_rows(model.vocabulary, torch.device(device)))
    tile = 4 * count * model.vocabulary
    return tile + (4 * model.vocabulary * model.width if model.head_trains else 0)


def parts(
    model: Model, needs: Activations, *, rows: int, device: str, way: str, count: int, vllm: int = 0
) -> dict[str, int]:
    """Bytes of every part on one device; their sum is what it needs at most.

    Args:
        rows: completion tokens of the largest pass.
        device: "cpu" or "cuda".
        way: one of WAYS.
        count: devices.
        vllm: of an engine on the same device.
    """
    in_step = 2 * model.largest if device == "cpu" else model.trained
    shared = WAYS[way](model, count)
    head = workspace(model, rows, device=device)
    beside = max(0, in_step // _sharing(way, count) - needs.kept - needs.more - head)
    return {
        **shared,
        "activations": needs.kept,
        "workspaces": needs.more + head + beside + (CONTEXT_BYTES if device == "cuda" else 0),
        **({"vLLM": vllm} if vllm else {}),
    }


def _held(model: Model, weights: float, trained: float, gradients: float, states: float) -> dict[str, int]:
    """What is held all the time, each part by the share of it that one device has."""
    return {
        "frozen weights": int(model.frozen * weights),
        "trained weights": int(model.trained * trained),
        "gradients": int(model.trained * gradients),
        "optimizer": int(model.states * states),
        "reference": int(model.copy * weights),
    }


def _one(model: Model, count: int) -> dict[str, int]:
    return _held(model, 1, 1, 1, 1)


def _ddp(model: Model, count: int) -> dict[str, int]:
    return {**_one(model, count), "buckets": model.trained}


def _fsdp2(model: Model, count: int) -> dict[str, int]:
    """Two layers are gathered at once, the one that runs and the next; embedding and head stay for the whole pass."""
    own = 1 / count
    return {**_held(model, own, own, own, own), "gathered": int((2 * model.block + model.root) * (1 - own))}


def _zero2(model: Model, count: int) -> dict[str, int]:
    own = 1 / count
    bucket = min(model.trained, int(BUCKET_NUMBERS * model.trained / max(1, model.numbers)))
    return {**_held(model, 1, 1, own, own), "buckets": bucket}


def _zero3(model: Model, count: int) -> dict[str, int]:
    own = 1 / count
    bucket = min(model.trained, int(BUCKET_NUMBERS * model.trained / max(1, model.numbers)))
    gathered = int((2 * model.block + model.root) * (1 - own))
    return {**_held(model, own, own, own, own), "gathered": gathered, "buckets": bucket}


WAYS: dict[str, Callable[[Model, int], dict[str, int]]] = {
    "one": _one,
    "ddp": _ddp,
    "zero2": _zero2,
    "fsdp2": _fsdp2,
    "zero3": _zero3,
}
"""How a run is spread over devices -> what one of them holds."""


def _sharing(way: str, count: int) -> int:
    """Among how many devices an optimizer step is shared."""
    return count if way in ("zero2", "fsdp2", "zero3") else 1
