"""Log-probabilities, softmax and sampling, exact to float32 whatever the model's dtype.

One folder per kernel: `reference.py` says what it computes, `op.py` registers it with torch, the C and CUDA sources
beside them make it fast. Everything works with plain torch where neither can be loaded.
"""

from align.kernels.head.api import LogprobOutput, linear_logprobs
from align.kernels.rows.api import log_softmax, logsumexp, selective_logprobs, softmax

__all__ = ["LogprobOutput", "linear_logprobs", "log_softmax", "logsumexp", "selective_logprobs", "softmax"]
