"""Tensor containers that cross module boundaries, and the legend of shape letters.

B lists, K list size, N completions, C learnt tokens of the completion that has most, R rows of input, T tokens of a
row, V vocabulary, H hidden width.
"""

from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LONGEST_WAIT = timedelta(days=30)
"""Of one process for the others; torch's half an hour is less than sampling or scoring can take."""


class Branch(NamedTuple):
    """A run of tokens that goes on from another's end."""

    size: int
    """Tokens, at least one."""
    parent: int
    """Number of the branch before it, whose tokens and their own past it sees; -1 where a tree begins."""


Branches = tuple[Branch, ...]
"""Of a packed row, in its order: every branch stands behind its parent's, the first child right behind it."""


@dataclass(frozen=True)
class ListBatch:
    """Some lists as tensors: the token sequences that the model reads, and which of their tokens belong to whom.

    Everything after the model's forward pass is laid out by completion ([N, C]) and by list ([B, K]), so nothing there
    depends on how sequences were padded or packed into rows.
    """

    input_ids: Int[Tensor, "R T"]
    """What the model reads: right-padded, or one packed row."""
    targets: Int[Tensor, "N C"]
    """Each completion's learnt token ids, in order and without holes; -1 beyond the last."""
    predict_at: Int[Tensor, "N C"]
    """Flat index r * T + t of the position that predicts each target; 0 beyond the last."""
    list_index: Int[Tensor, " N"]
    """Which list a completion belongs to; completions of a list are contiguous."""
    slot: Int[Tensor, " N"]
    """A completion's place in its list: values [N] scatter to [B, K] at (list_index, slot)."""
    grades: Float[Tensor, "B K"]
    """Larger is better, float64: a tie is a tie of the rows' own numbers; anything where list_mask is False."""
    list_mask: Bool[Tensor, "B K"]
    """False marks a place that no completion fills."""
    reference_logprobs: Float[Tensor, "N C"] | None = None
    """Cached log-probabilities of the targets under the reference, in nats; 0 beyond a completion's end."""
    token_rewards: Float[Tensor, "N C"] | None = None
    """What a token is worth (T-REG's rhat), where lists have it; 0 beyond a completion's end."""
    token_weights: Float[Tensor, "N C"] | None = None
    """How much a token's log-probability counts, where rows or their messages say so; 0 beyond a completion's end."""
    keys: Int[Tensor, " B"] | None = None
    """What a list's random draws follow from: its row and the step, so not how the step is cut."""
    position_ids: Int[Tensor, "R T"] | None = None
    """Each token's place in its own sequence, where a row holds several; None where a row is one."""
    ends_at: Int[Tensor, " N"] | None = None
    """Flat index r * T + t of each completion's last token, learnt or not, where its reward is read."""
    weights: Float[Tensor, " B"] | None = None
    """How often each list counts in its step, float64, where rows say so; None where each counts once."""
    margins: Float[Tensor, " B"] | None = None
    """How far apart each list's pairs should score, in the scores' unit, where rows say so; 0 for one that does not."""
    branches: Branches | None = None
    """Of a packed row; None where rows are padded."""

    @property
    def completion_mask(self) -> Bool[Tensor, "N C"]:
        """True on a completion's own tokens, of those that are learnt."""
        return self.targets >= 0

    def to_lists(self, values: Float[Tensor, " N"]) -> Float[Tensor, "B K"]:
        """Per-completion values by list; 0 where no completion is. Gradients flow back."""
        lists = values.new_zeros(self.grades.shape)
        return lists.index_put((self.list_index, self.slot), values)

    def to(self, device: torch.device | str, **_: object) -> "ListBatch":
        """The same batch on another device (accelerate passes keywords that do not matter here)."""
        moved: dict[str, Any] = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}
        return type(self)(**moved)


@dataclass(frozen=True)
class TokenStats:
    """What a forward pass says about each target token, float32; 0 beyond a completion's end."""

    logprobs: Float[Tensor, "N C"]
    """log p(target), in nats."""
    entropy: Float[Tensor, "N C"] | None = None
    """Entropy of the next-token distribution, in nats, where asked for."""
    log_sum_sq_probs: Float[Tensor, "N C"] | None = None
    """log sum_v p_v^2, where asked for (WPO)."""
    hidden_sum: Float[Tensor, "N H"] | None = None
    """Sum of the final hidden states that predict a completion's tokens, float64, where asked for (CHES)."""
    hidden_diversity: Float[Tensor, " N"] | None = None
    """How far the first hidden states of a completion point apart, where asked for; NaN where nothing is learnt."""
    logsumexp: Float[Tensor, "N C"] | None = None
    """log Z, of what the head's softmax divides by, where asked for."""
    mean_logit: Float[Tensor, "N C"] | None = None
    """Mean over the vocabulary of the logits, where asked for."""
    is_top: Float[Tensor, "N C"] | None = None
    """1 where no token is likelier than the target, where asked for."""
    router_logits: tuple[Float[Tensor, "RT E"], ...] | None = None
    """Of every layer of experts, for every token that the model read, where asked for."""


def _move(value: object, device: torch.device | str) -> object:
    return value.to(device) if isinstance(value, Tensor) else value
