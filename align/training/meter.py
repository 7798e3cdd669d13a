"""What a run measures of its policy before and after training."""

import logging
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset

from align.data import Row, prompt_text
from align.evaluate.samples import Measured
from align.evaluate.sampling import sample_completions
from align.evaluate.token_view import TokenView
from align.model.policy import Policy
from align.model.sharding import gathered
from align.progress import progress, stage
from align.recipe import Recipe
from align.report.summary import ROWS
from align.runs.memory import scoring_in_words
from align.runs.scorers import load_scorer
from align.runs.told import told_by_main
from align.training.parts import RunParts
from rewards.types import Asked

log = logging.getLogger("align")


class Meter:
    """Measures the policy of a run as it is: held-out metrics, samples with rewards, and some lists token by token."""

    def __init__(self, parts: RunParts, scorer: Any) -> None:
        """Args:
        scorer: of the samples; None for none.
        """
        recipe, trainer, policy = parts.recipe, parts.trainer, parts.policy
        samples = recipe.task != "reward"
        self.parts, self.scorer = parts, scorer
        rows = parts.prepared.heldout_rows[: recipe.sampling.prompts] if samples else []
        self.prompts = [_for_scorer(row, policy) for row in rows]
        count = recipe.sampling.token_lists if samples else 0
        lists = (trainer.scorer, policy, parts.heldout, trainer.accelerator)
        self.view = TokenView(*lists, count=count, weights=lambda batch: trainer.loss.message_weights(batch))

    def before(self, known: Path | None) -> Measured:
        """What was measured before the first step: once, unless its file is damaged.

        Args:
            known: where it stands already, measured of the same policy by another run.
        """
        run = self.parts.run
        problem = told_by_main(lambda: run.digests.problem([run.before.name]))
        if run.before.exists() and not problem:
            return Measured.load(run.before)
        if problem:
            log.warning("%s; it is measured again", problem)
        measured = Measured.load(known) if known else self.measure("before")
        if self.parts.trainer.is_world_process_zero():
            with run.replaced(run.before) as file:
                measured.save(file)
        return measured

    def measure(self, when: str) -> Measured:
        """The policy as it is now; `when` it is, before or after training."""
        trainer = self.parts.trainer
        found: dict[str, dict[int, float]] = {name: {} for name, *_ in ROWS}
        metrics = trainer.evaluate_heldout(found, label=f"evaluating {when} training")
        by_list = {
            name: [value for _, value in sorted(gather_object(list(own.items())))] for name, own in found.items()
        }
        with trainer.accelerator.autocast(), gathered(trainer.scorer):
            completions = _sample(self.parts.recipe, self.parts.policy, self.parts.heldout) if self.prompts else []
        reward, run = self.parts.recipe.sampling.reward, self.parts.run
        with scoring_in_words(reward, "sampling.reward.tokens_per_batch={}", goes_on=f"it {run.goes_on()}"):
            rewards = stage("scoring the samples")(self.scorer.score)(self.prompts, completions) if self.scorer else []
        return Measured(metrics, completions, list(rewards), self.view.logprobs(), by_list)

    def heldout_prompts(self) -> list[str]:
        """As text, in the order of the held-out rows."""
        return [prompt_text(row, self.parts.policy.tokenizer) for row in self.parts.prepared.heldout_rows]


def sample_scorer(recipe: Recipe) -> Any:
    """What scores the samples, if anything does."""
    reward = recipe.sampling.reward
    return stage("loading the scorer")(load_scorer)(reward) if reward else None


def _sample(recipe: Recipe, policy: Policy, heldout: Dataset) -> list[str]:
    sampling = recipe.sampling
    prompts = [heldout[i]["prompt_ids"] for i in range(min(sampling.prompts, len(heldout)))]
    with progress("sampling", len(prompts), unit="completions") as advance:
        completions = sample_completions(
            policy.model,
            policy.tokenizer,
            prompts,
            **sampling.model_dump(include={"max_tokens", "temperature", "top_k", "top_p"}),
            seed=recipe.train.seed,
            tokens_per_batch=recipe.train.batch_tokens,
            advance=advance,
        )
    return [texts[0] for texts in completions]


def _for_scorer(row: Row, policy: Policy) -> Any:
    """A prompt as a scorer reads it: text or messages; token ids are decoded."""
    if isinstance(row.prompt, list) and row.prompt and isinstance(row.prompt[0], int):
        return policy.tokenizer.decode(row.prompt, skip_special_tokens=True)
    return Asked.of(row.prompt, row.template_arguments)  # type: ignore[arg-type]
