"""Which models can take packed rows."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from align.model.forward import evaluating, logprobs
from align.model.load import first_line
from align.model.probe import probe_lists, tolerance
from align.packing import ATTENTION, Tree, packed_collate
from align.packing.attention import unread_layers
from align.packing.batch import collate
from align.packing.states import leave_trees, take_trees, with_state
from rewards.logits import decoder_of

log = logging.getLogger(__name__)


def enable_packing(base: PreTrainedModel, *, name: str, read: Callable[..., Tensor] = logprobs) -> bool:
    """Give a model the attention that packed rows need, if it is then the same model.

    Args:
        read: what must stay the same: a function of the model, a batch and its tree.

    Returns:
        Whether it is; if not, the model is left as it was, and one line says why.
    """
    attention = base.config.get_text_config()._attn_implementation
    problem = f"there is no packed form of attention {attention}"
    if attention in ATTENTION:
        with evaluating(base), torch.no_grad():
            problem = _problem(base, attention, read)
    if problem:
        log.warning("%s (%s): lists run as separate padded rows, since %s", name, base.config.model_type, problem)
    return not problem


def _problem(base: PreTrainedModel, attention: str, read: Callable[..., Tensor]) -> str:
    """Switch to tree attention; if results change, switch back and say how."""
    lists = probe_lists(base)
    padded, packed = collate(lists, pad_id=0).to(base.device), packed_collate(lists).to(base.device)
    expected = read(base, padded)
    tree = Tree(packed.branches or ())
    decoder = decoder_of(base)
    take_trees(decoder)
    try:
        base.set_attn_implementation(ATTENTION[attention])
        found = torch.stack([read(base, padded), read(base, packed, tree=tree)])
        difference = (found - expected).abs().max().item()
        problem = unread_layers(tree, decoder, with_state(decoder))
        if not difference <= tolerance(base.dtype):
            problem = f"packed its results differ by {difference:.2g}"
    except Exception as error:  # whatever a model's own code makes of arguments that it does not know
        problem = f"its code does not take packed rows ({first_line(error)})"
    if problem:
        leave_trees(decoder)
    if problem and base.config.get_text_config()._attn_implementation != attention:
        base.set_attn_implementation(attention)
    return problem
