"""What vLLM's workers get from us besides a logits processor."""


class OurSampler:
    """A method that vLLM's workers get (`worker_extension_cls`)."""

    def use_one_read_sampler(self) -> None:
        """Put our sampler into the worker's model runner, whichever of the two it is."""
        sampler = self.model_runner.sampler  # type: ignore[attr-defined]  # the worker's
        if type(sampler).__module__ == "vllm.v1.sample.sampler":
            from align.rollout.inside_vllm import runner_v1 as runner
        else:
            from align.rollout.inside_vllm import runner_v2 as runner  # type: ignore[no-redef]
        sampler.__class__ = runner.OneReadSampler
