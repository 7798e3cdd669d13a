"""Contrast with the logits of the same completion in another context, or of another adapter."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from align.kernels import contrast_logits
from align.rollout.config import Contrast
from align.rollout.inside_vllm.request import Request


class Contrasted:
    """(1 + strength) z - strength z', with z' the logits that the same completion has in another context or model.

    Two requests write one completion: `extra` of both names the `pair`, and the one in the other context is `against`.
    They stay in step, and draw the same token, since both get the same logits and have the same seed.
    """

    def __init__(self, config: Contrast) -> None:
        self.config = config

    def alter(self, logits: Float[Tensor, "B V"], requests: Sequence[Request]) -> Float[Tensor, "B V"]:
        """As every decoding.

        Raises:
            RuntimeError: the requests of a pair have not written the same.
        """
        sides: dict[bool, dict[str, int]] = {False: {}, True: {}}
        for row, request in enumerate(requests):
            if "pair" in request.extra:
                sides[request.extra["against"]][request.extra["pair"]] = row
        own, other = sides[False], sides[True]
        if not own and not other:
            return logits
        rows = [(own.get(pair), other.get(pair)) for pair in own | other]
        if any(a is None or b is None or requests[a].output != requests[b].output for a, b in rows):
            raise RuntimeError("a completion and the one it is held against are out of step")
        first, second = torch.tensor(rows, device=logits.device).T
        pair = torch.full((len(logits),), -1, device=logits.device)
        pair[first] = second
        altered = contrast_logits(logits, pair, self.config.strength, mask_tau=self.config.plausible)
        altered[second] = altered[first]
        return altered
