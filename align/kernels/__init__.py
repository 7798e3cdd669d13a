"""Log-probabilities, softmax and sampling, exact to float32 whatever the model's dtype.

One folder per kernel: `reference.py` says what it computes, `api.py` is what others call, `op.py` registers it with
torch; the C and CUDA sources beside them make it fast. `native` loads the C library, `cuda` compiles the CUDA sources;
plain torch does the work where neither can run.
"""

from align.kernels.contrast.api import contrast_logits
from align.kernels.head.api import LogprobOutput, linear_logprobs
from align.kernels.rows.api import log_softmax, logsumexp, selective_logprobs, softmax
from align.kernels.sampling.api import Sample, sample

__all__ = [
    "LogprobOutput",
    "Sample",
    "contrast_logits",
    "linear_logprobs",
    "log_softmax",
    "logsumexp",
    "sample",
    "selective_logprobs",
    "softmax",
]
