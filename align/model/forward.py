"""ListBatch -> hidden states at completion positions -> log-probabilities of their targets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, cast

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import PreTrainedModel

from align.fused import asked_rows
from align.kernels import linear_logprobs
from align.packing import Tree
from align.packing.rope import regimes, sequence_length
from align.packing.states import telling
from align.types import ListBatch, TokenStats
from rewards.logits import decoder_of, scale_and_cap

# FSDP hooks the backward pass of what a module returns, and looks for tensors in registered containers only.
_pytree.register_dataclass(TokenStats)


OF_HIDDEN = ("hidden_sum", "hidden_diversity")
"""What can be asked for of the hidden states before the head."""
STATES = 128
"""Of a completion, whose diversity is measured."""


class Scored(Protocol):
    """What a scorer needs of a policy."""

    model: Any
    stand_in: Any
    """The frozen model that is asked in the policy's place while its reference is entered, if it has one."""


class TokenScorer(nn.Module):
    """The policy as one module from lists to token statistics, so that DDP and FSDP can wrap it.

    It scores with the reference instead while `policy.reference()` is entered.
    """

    def __init__(self, policy: Scored) -> None:
        super().__init__()
        self.model = policy.model
        self._policy = policy

    def forward(self, batch: ListBatch, outputs: tuple[str, ...] = ("logprob",)) -> TokenStats:
        """Statistics of every learnt completion token given what is before it.

        Rows are right-padded and attention is causal, so padding needs no mask: nothing that counts can see it. A
        packed row needs a model that `enable_packing` has taken.

        Args:
            batch: whose completion positions alone go through the LM head.
            outputs: any of linear_logprobs' "logprob", "entropy", "log_sum_sq_probs", "logsumexp",
            and those of OF_HIDDEN.

        Returns:
            Float32 [N, C]; 0 beyond a completion's end, None for what was not asked for.
        """
        model = self._policy.stand_in or self.model
        return score_tokens(model, batch, outputs)


def score_tokens(
    model: nn.Module,
    batch: ListBatch,
    outputs: tuple[str, ...] = ("logprob",),
    tree: Tree | None = None,
    temperature: float = 1.0,
) -> TokenStats:
    """What a causal language model, with or without an adapter, says about a batch's targets; see TokenScorer.

    Args:
        tree: of a packed batch; by default made from it.
        temperature: divides the logits.
    """
    mask = batch.completion_mask
    routers = None
    if "router_logits" in outputs:
        rows, routers = _routed(base_model(model), batch, tree)
    else:
        rows = last_hidden(model, batch, tree)
    head = head_of(base_model(model))
    # Entropy and the like are looked at, not trained on, so a frozen head needs no second pass for their gradients.
    frozen = head["lora"] is None and not head["weight"].requires_grad
    grad: Literal["direction", "auto"] = "direction" if frozen and rows.requires_grad else "auto"
    targets = batch.targets[mask]
    first, whose = _alike(batch.predict_at[mask], targets, apart=hasattr(base_model(model), "frequency_bounds"))
    of_head = tuple(name for name in outputs if name not in (*OF_HIDDEN, "router_logits"))
    stats = linear_logprobs(
        rows[first], targets=targets[first], outputs=of_head, grad=grad, temperature=temperature, **head
    )

    def everywhere(values: Tensor | None) -> Tensor | None:
        return None if values is None else _scatter(values[whose], mask)

    return TokenStats(
        logprobs=_scatter(stats.logprob[whose], mask),
        entropy=everywhere(stats.entropy),
        log_sum_sq_probs=everywhere(stats.log_sum_sq_probs),
        hidden_sum=_sums(rows, mask) if "hidden_sum" in outputs else None,
        hidden_diversity=_diversities(rows, mask) if "hidden_diversity" in outputs else None,
        logsumexp=everywhere(stats.logsumexp),
        mean_logit=everywhere(stats.mean_logit),
        is_top=everywhere(stats.is_top),
        router_logits=routers,
    )


def _alike(places: Int[Tensor, " M"], targets: Int[Tensor, " M"], *, apart: bool) -> tuple[Any, Any]:
    """Which targets stand for all, and which of those stands for each: what completions share is predicted once.

    Args:
        apart: every one for itself, since a position's state depends on the completion that asks for it.
    """
    order = (places * 2**32 + targets).argsort(stable=True)
    fresh = torch.ones_like(order, dtype=torch.bool)
    fresh[1:] = (places[order].diff() != 0) | (targets[order].diff() != 0)
    if apart or fresh.all():
        return slice(None), slice(None)
    return order[fresh], torch.empty_like(order).index_copy_(0, order, fresh.cumsum(0) - 1)


def logprobs(model: nn.Module, batch: ListBatch, tree: Tree | None = None) -> Float[Tensor, "N C"]:
    """A language model's log-probability of every target."""
    return score_tokens(model, batch, tree=tree).logprobs


def last_hidden(
    model: nn.Module, batch: ListBatch, tree: Tree | None = None, places: Int[Tensor, " N"] | None = None
) -> Float[Tensor, "M H"]:
    """The decoder's output at flat indices r * T + t of a batch's rows.

    Args:
        places: one of every completion; by default where each target is predicted, in the order of the completion
            mask's True cells.
    """
    mask = batch.completion_mask
    owners = mask.nonzero()[:, 0] if places is None else torch.arange(len(places), device=places.device)
    places = batch.predict_at[mask] if places is None else places
    base = base_model(model)
    passes = regimes(base, sequence_lengths(batch)) if hasattr(base, "frequency_bounds") else []
    if not passes:
        return _decoded(base, batch, tree, places)
    found: list[Tensor] = []
    chosen = [torch.isin(owners, members).nonzero()[:, 0] for _, members in passes]
    for (length, _), own in zip(passes, chosen, strict=True):
        with sequence_length(length):
            found.append(_decoded(base, batch, tree, places[own]))
    return torch.cat(found)[torch.cat(chosen).argsort()]


def sequence_lengths(batch: ListBatch) -> Int[Tensor, " N"]:
    """Tokens of every completion with its prompt."""
    assert batch.ends_at is not None, "the collators give it"
    if batch.position_ids is None:
        return batch.ends_at % batch.input_ids.shape[1] + 1
    return batch.position_ids.flatten()[batch.ends_at] + 1


def _decoded(base: PreTrainedModel, batch: ListBatch, tree: Tree | None, places: Tensor) -> Float[Tensor, "M H"]:
    decoder, packed = decoder_of(base), _packed(batch, tree)
    with asked_rows(places.unique()), telling(decoder, packed.get("tree")):
        output = decoder(input_ids=batch.input_ids, use_cache=False, **packed)
    return output.last_hidden_state.flatten(0, 1)[places]


def _routed(base: PreTrainedModel, batch: ListBatch, tree: Tree | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As last_hidden, with the logits of every layer's router, which take every token of the last layer too."""
    decoder, packed = decoder_of(base), _packed(batch, tree)
    with telling(decoder, packed.get("tree")):
        output = decoder(input_ids=batch.input_ids, use_cache=False, output_router_logits=True, **packed)
    return output.last_hidden_state.flatten(0, 1)[batch.predict_at[batch.completion_mask]], output.router_logits


def _packed(batch: ListBatch, tree: Tree | None) -> dict[str, Any]:
    """What a decoder is told about a packed row; nothing about rows that are one sequence each."""
    if batch.branches is None:
        return {}
    # A mask of four dimensions is passed on as it is, so no mask over the whole row is built; ours reads `tree`.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    tree = tree or Tree(batch.branches)
    tree.passes += 1
    return {"position_ids": batch.position_ids, "attention_mask": unread, "tree": tree}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; behind it the model is in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def base_model(model: nn.Module) -> PreTrainedModel:
    """transformers' model, with the adapter's layers in it if there is one."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def head_of(base: PreTrainedModel) -> dict[str, Any]:
    """The LM head as keywords of linear_logprobs: logits = cap tanh(scale (h W' + b) / cap)."""
    head: Any = base.get_output_embeddings()
    lora = None
    if isinstance(head, LoraLinear):
        lora, head = _active_lora(head), head.get_base_layer()
    return {"weight": head.weight, "bias": head.bias, "lora": lora, **scale_and_cap(base.config.get_text_config())}


def is_multimodal(base: PreTrainedModel) -> bool:
    """Whether a model reads more than text."""
    return base.config.get_text_config() is not base.config


def language_part(base: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a module or parameter, by its name, belongs to the part that reads and writes text."""
    if not is_multimodal(base):
        return lambda name: True
    parts = [decoder_of(base), base.get_output_embeddings()]
    own = tuple(f"{prefix}." for prefix, module in base.named_modules() if any(module is part for part in parts))
    return lambda name: f"{name}.".startswith(own)


def _active_lora(head: Any) -> tuple[Tensor, Tensor, float] | None:
    if head.disable_adapters:
        return None
    (name,) = head.active_adapters
    if name not in head.lora_A:
        return None
    return head.lora_A[name].weight, head.lora_B[name].weight, head.scaling[name]


@torch.no_grad()
def _diversities(rows: Float[Tensor, "M H"], mask: Tensor) -> Float[Tensor, " N"]:
    return torch.stack([hidden_diversity(own) for own in rows.split(mask.sum(dim=1).tolist())])


def hidden_diversity(states: Float[Tensor, "L H"]) -> Float[Tensor, ""]:
    """How far states point apart: the nuclear norm of their directions over their number, of the first STATES of them.

    1 where all are at right angles to each other, 1 / sqrt(L) where all point the same way.

    Args:
        states: of tokens, none of them 0; NaN for no tokens, or where one is not finite.

    Source: arXiv:2410.10672, whose sum of the largest norms of columns is the same where columns are orthogonal; that
        sum reads states of one direction across all axes as most diverse, so that the norm itself is taken here
    """
    directions = nn.functional.normalize(states[:STATES].double(), dim=1)
    if not directions.isfinite().all():  # of a policy that has diverged, for which no decomposition converges
        return states.new_tensor(torch.nan, dtype=torch.float32)
    squares = torch.linalg.eigvalsh(directions @ directions.T)
    return (squares.clamp(min=0).sqrt().sum() / len(directions)).float()


def _sums(rows: Float[Tensor, "M H"], mask: Tensor) -> Float[Tensor, "N H"]:
    return torch.stack([own.double().sum(dim=0) for own in rows.split(mask.sum(dim=1).tolist())])


def _scatter(values: Float[Tensor, " M"], mask: Tensor) -> Float[Tensor, "N C"]:
    # Not masked_scatter: its backward pass cannot be made deterministic on a GPU.
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).index_put(
        mask.nonzero(as_tuple=True), values
    )
