"""vLLM's second model runner on a CPU: its Triton kernels run in Triton's interpreter, slowly.

`python tests/rollout/second_runner.py FOLDER` prints what the engine samples as a line of JSON. Needs a real `triton`
(the CPU environment has an empty one).
"""

import json
import os
import sys
from dataclasses import asdict
from types import SimpleNamespace

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


class InterpretedDriver:
    """Stands in for the CPU driver that Triton's wheel does not have."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(folder: str) -> None:
    import triton.backends
    from triton.runtime.driver import driver

    triton.backends.backends["cpu"] = SimpleNamespace(driver=InterpretedDriver, compiler=None)
    driver.set_active(InterpretedDriver())

    from align.rollout.engine import Sampling
    from align.rollout.vllm_engine import VllmArguments, VllmEngine

    decoding = {"name": "contrast", "strength": 0.7, "plausible": 0.05}
    engine = VllmEngine(VllmArguments(folder, "float32", 256, cache_bytes=16 << 20, decoding=decoding))
    sampling = Sampling(completions=2, max_tokens=6, seed=5, temperature=0.8, top_p=0.9, top_k=20, stop_ids=(2,))
    prompts = [[5, 6, 7], [9], [8, 3, 4, 4]]
    alone = dict(engine.sample(prompts, sampling))
    contrasted = dict(engine.sample(prompts, sampling, [[11, *ids] for ids in prompts]))
    runner = type(engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
    lines = [{place: [asdict(one) for one in own] for place, own in sorted(drawn.items())} for drawn in (alone, contrasted)]
    print(json.dumps({"runner": runner.__module__, "alone": lines[0], "contrasted": lines[1]}))


if __name__ == "__main__":
    main(sys.argv[1])
