"""From a recipe and the lengths of its rows to what its run needs: memory, operations, disk, and what would help."""

from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig

from align.model.adapters import Full
from align.planning.activations import Activations, Measure
from align.planning.empty import empty_model, read_config
from align.planning.lengths import Passes, cells_of, of_run
from align.planning.memory import WAYS, Model, of_model, parts
from align.recipe import Recipe
from align.runs.build import loss_of

MARGIN = 1.15
"""How far a figure of memory may be off: what is planned over this many times what is there is refused."""
FREE_SHARE = 0.8
"""As `gradient_checkpointing: auto` shares out what is free."""


@dataclass(frozen=True)
class Devices:
    """What a run is planned for."""

    kind: str
    """"cpu" or "cuda"."""
    count: int
    memory: int
    """Bytes of one; of a CPU those of the machine."""


@dataclass
class Plan:
    """What a run needs."""

    parameters: int
    trained: int
    steps: int
    looked_at: int
    passes: int
    largest_pass: int
    tokens: int
    """Cells that the layers read in the whole run."""
    checkpointed: int
    layers: int
    devices: Devices
    memory: dict[str, dict[str, int]]
    """Way of spreading the run -> part -> bytes on one device."""
    operations: dict[str, float]
    """What is computed -> floating-point operations of the whole run."""
    disk: dict[str, int]
    """What is kept -> bytes."""
    remedies: list[str] = field(default_factory=list)

    def total(self, way: str) -> int:
        return sum(self.memory[way].values())

    def fits(self, way: str) -> bool:
        return self.total(way) <= self.devices.memory

    def hours(self, rate: float) -> float:
        """Args:
        rate: operations per second of one device.
        """
        return sum(self.operations.values()) / (rate * self.devices.count) / 3600

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"total": {way: self.total(way) for way in self.memory}}


def make_plan(recipe: Recipe, train: Dataset, heldout: Dataset, devices: Devices) -> Plan:
    """What the recipe's run over these tokenised lists needs.

    Raises:
        UserError: its model cannot be made.
    """
    config = read_config(recipe.policy)
    passes = of_run(recipe, train, processes=devices.count)
    whole = empty_model(recipe, config, total_steps=passes.steps)
    needs_reference = loss_of(recipe).needs_reference
    model = of_model(whole, recipe, needs_reference=needs_reference)
    needs = _needs(recipe, config, passes, model, devices)
    return Plan(
        parameters=sum(p.numel() for p in whole.parameters()),
        trained=model.numbers,
        steps=passes.steps,
        looked_at=passes.looked_at,
        passes=passes.per_step,
        largest_pass=needs.tokens,
        tokens=passes.tokens,
        checkpointed=needs.checkpointed,
        layers=needs.layers,
        devices=devices,
        memory=_memory(recipe, model, needs, passes, devices),
        operations=_operations(recipe, config, needs, passes, model, (train, heldout), needs_reference),
        disk=_disk(recipe, model, whole),
    )


def _rows(lists: list[dict[str, Any]]) -> int:
    return sum(len(ids) for one in lists for ids in one["completion_ids"])


def _needs(recipe: Recipe, config: PretrainedConfig, passes: Passes, model: Model, devices: Devices) -> Activations:
    """Activations under the recipe's checkpointing, which `auto` chooses by what is left beside the rest."""
    measure = Measure(recipe, config, passes.largest, steps=passes.steps, again=passes.per_step > 1)
    wanted = recipe.train.gradient_checkpointing
    if wanted is True:
        return measure.passes(measure.layers - 1)
    plain = measure.passes(0)
    if wanted is False:
        return plain
    held = model.frozen + model.trained + model.copy
    own = recipe.train.activation_memory_gb
    budget = own * 1e9 if own else FREE_SHARE * max(0, devices.memory - held)
    if plain.kept <= budget or measure.layers < 2:
        return plain
    least = measure.passes(measure.layers - 1)
    share = (plain.kept - budget) / max(1, plain.kept - least.kept)
    return measure.passes(min(measure.layers - 1, int(share * (measure.layers - 1)) + 1))


def _memory(
    recipe: Recipe, model: Model, needs: Activations, passes: Passes, devices: Devices
) -> dict[str, dict[str, int]]:
    ways = list(WAYS) if devices.count > 1 else ["one"]
    options: dict[str, Any] = {"rows": _rows(passes.largest), "device": devices.kind, "count": devices.count}
    vllm = _vllm(recipe, model, devices.kind)
    if recipe.train.activation_offload:
        needs = needs._replace(kept=0)  # on the host, but for what the layer that runs has in its hands
    return {way: parts(model, needs, way=way, vllm=vllm, **options) for way in ways}


def _vllm(recipe: Recipe, model: Model, kind: str) -> int:
    """What an engine that stays beside the policy holds; one that sleeps while the policy trains holds nothing then."""
    engine = recipe.rollout.engine
    if recipe.online is None or engine.name != "vllm":
        return 0
    resident = engine.while_training == "resident" or (engine.while_training == "auto" and kind == "cpu")
    return model.frozen + model.trained + int(engine.cache_gib * 2**30) if resident else 0


def _operations(
    recipe: Recipe,
    config: PretrainedConfig,
    needs: Activations,
    passes: Passes,
    model: Model,
    lists: tuple[Dataset, Dataset],
    needs_reference: bool,
) -> dict[str, float]:
    """Floating-point operations: of the layers as traced, of attention and the head by their formulas."""
    text: Any = config.get_text_config()
    inner = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    attention = 4.0 * inner * text.num_hidden_layers * passes.pairs
    head = 2.0 * model.vocabulary * model.width * passes.completions
    again = needs.checkpointed / max(1, needs.layers)
    forward = needs.forward / needs.tokens * passes.tokens + attention + head
    layers = needs.flops / needs.tokens * passes.tokens
    found = {"training": layers + (3.5 + again) * attention + (4 if model.head_trains else 2) * head}
    per_token = forward / max(1, passes.tokens)
    once, held = (cells_of(part, packed=recipe.train.packing) for part in lists)
    cached = recipe.reference.cache and recipe.reference.name == "initial"
    if needs_reference:
        found["reference"] = per_token * (once + held if cached else passes.tokens)
    times = 2 + (passes.steps // recipe.train.eval_steps if recipe.train.eval_steps else 0)
    found["evaluation"] = per_token * held * times
    return found


def _disk(recipe: Recipe, model: Model, whole: nn.Module) -> dict[str, int]:
    """Checkpoints hold what trains, an adapter's fixed factors and its frozen start, and the optimizer; a new one is
    there before an old one goes."""
    start = model.copy if not isinstance(recipe.policy.adapter, Full) else 0
    each = model.saved + start + model.states
    found = {f"{recipe.train.keep_checkpoints + 1} checkpoints": (recipe.train.keep_checkpoints + 1) * each}
    found["exported"] = model.exported
    if recipe.train.keep_best:
        found["best"] = model.saved + start
    return found
