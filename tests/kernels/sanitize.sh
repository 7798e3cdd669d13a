#!/usr/bin/env bash
# The kernels' tests under compute-sanitizer: memory errors, races in shared memory, barriers. Needs a CUDA device.
# Arguments go to pytest, for instance: tests/kernels/sanitize.sh -k sample
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # an allocation per tensor, so that reads beyond one are seen
python=${PYTHON:-python3}
"$python" -m pytest -q -m gpu --confcutdir tests/kernels tests/kernels "$@" # compiles what the cache lacks
for tool in memcheck racecheck synccheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        "$python" -m pytest -q -x -m gpu --confcutdir tests/kernels tests/kernels/test_cuda_source.py "$@"
done
