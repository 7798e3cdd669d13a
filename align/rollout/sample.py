"""`align rollout`: prompts -> rows of completions, with rewards where the recipe names a scorer."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from align.data.schema import Row, is_messages
from align.errors import UserError
from align.evaluate.sampling import Sampled, completion_text
from align.files import read_json, write_json
from align.model.policy import Policy, load_policy
from align.progress import progress
from align.recipe import Recipe, load_recipe
from align.recipe.idle import say_idle
from align.rollout.agreement import check_agreement
from align.rollout.config import Contrast
from align.rollout.engine import Engine, Sampling, Weights
from align.rollout.engines import check_engine, open_engine, sync_kind
from align.rollout.journal import Journal, Line, read_lines
from align.rollout.prompts import PromptSet, describe_prompts, read_prompts
from align.rollout.weights import remove_older, write_weights, write_zeros
from align.runs.memory import scoring_in_words
from align.runs.run_directory import RunDirectory, start_log
from align.runs.start import start_from
from rewards import load_scorer

log = logging.getLogger("align")

SCORED_AT_ONCE = 32
"""Lists that a scorer gets at a time; a kill costs no more."""


class Stages:
    """The finished stages of an iteration, with their figures: `stages.json`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "stages.json"

    def read(self) -> dict[str, Any]:
        """Stage -> figures."""
        return read_json(self.path) if self.path.exists() else {}

    def do(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage unless it is finished; its figures, with the seconds that it took."""
        done = self.read()
        if name not in done:
            began = time.monotonic()
            figures = stage()
            done |= {name: {**figures, "seconds": time.monotonic() - began}}
            write_json(self.path, done)
        return done[name]


def rollout(recipe: Recipe) -> Path:
    """Sample the recipe's policy on the prompts of `data.sources`, into `output`/rollout/rows.jsonl.

    The same call on the same folder goes on where it stopped.

    Returns:
        The file of rows.

    Raises:
        UserError: the recipe, its prompts, policy or engine cannot work.
    """
    check_engine(recipe)
    run = RunDirectory(recipe.output)
    if run.summary.exists() or (run.path / "iterations").exists():
        raise UserError(
            f"{run.path}: holds a training; to sample it set policy.start_run={run.path} and another `output`"
        )
    run.open(recipe)
    start_log(run, main=True)
    say_idle(recipe)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    folder = run.path / "rollout"
    stages = Stages(folder)
    if "score" not in stages.read():
        prompts = read_prompts(recipe)
        log.info("%s", describe_prompts(prompts))
        if len({source.weight for source in recipe.data.sources}) > 1:
            log.info("data.sources: every prompt is sampled once, whatever its source's weight")
        sampler = Sampler(recipe, run.path)
        try:
            figures = stages.do("sample", lambda: sampler.sample(folder, prompts, seed=recipe.train.seed))
        finally:
            sampler.close()
        figures |= stages.do("score", lambda: score(recipe, folder))
        log.info("%s", describe(figures))
    log.info("written to %s", folder / "rows.jsonl")
    return folder / "rows.jsonl"


class Sampler:
    """The engine of a recipe, started when it is first needed, and the policy that it samples from."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """Args:
        folder: where weights for the engine and its log go.
        """
        self.recipe, self.folder = recipe, folder
        self.engine: Engine | None = None

    def sample(
        self, folder: Path, prompts: PromptSet, *, seed: int, trained: Path | None = None, version: int | None = None
    ) -> dict[str, Any]:
        """Sample every prompt into `folder`/sampled.jsonl.

        Args:
            seed: of the completions.
            trained: the run whose policy is sampled; by default what the recipe starts from.
            version: optimizer steps that made it.

        Returns:
            Figures of the stage.
        """
        section = self.recipe.rollout
        journal = Journal(folder / "sampled.jsonl")
        sampling = Sampling(
            completions=section.completions,
            max_tokens=section.max_tokens,
            seed=seed,
            temperature=section.temperature,
            top_k=section.top_k,
            top_p=section.top_p,
            min_p=section.min_p,
            stop=section.stop,
            stop_ids=(*prompts.ends, *section.stop_ids),
        )
        start = self.recipe.policy.start_run or self.recipe.policy.start_adapter
        trained = trained or (Path(start).expanduser() if start else None)
        version = policy_version(self.recipe.policy.start_run) if version is None else version
        figures: dict[str, Any] = {"prompts": len(prompts.rows), "left_out": prompts.left_out}
        figures["text_left_out"] = prompts.text_left_out
        if not journal.whole:
            figures |= self._synchronise(trained, version, prompts, sampling)
            figures |= self._fill(journal, prompts, sampling, version)
        return figures | {"policy_version": version}

    def rest(self, *, stop: bool) -> None:
        """Give memory back until the next sampling."""
        if self.engine:
            self.engine.rest(stop=stop)

    def close(self) -> None:
        """Free everything."""
        if self.engine:
            self.engine.close()

    def _synchronise(
        self, trained: Path | None, version: int, prompts: PromptSet, sampling: Sampling
    ) -> dict[str, Any]:
        """Load the policy into the engine, and see that the engine agrees with it."""
        began = time.monotonic()
        self.engine = self.engine or open_engine(self.recipe, self.folder)
        weights = self._write_weights(trained, version)
        if weights:
            self.engine.load(weights)
            remove_older(weights)
        figures: dict[str, Any] = {"sync_seconds": time.monotonic() - began}
        count = self.recipe.rollout.agreement_prompts
        if count:
            bound = self.recipe.rollout.agreement_bound
            policy = load_trained(self.recipe, trained)
            figures["agreement"] = asdict(
                check_agreement(self.engine, policy, prompts.ids[:count], sampling, bound=bound)
            )
        return figures

    def _write_weights(self, trained: Path | None, version: int) -> Weights | None:
        """What the engine is to load, if anything: the policy, and the adapter that a contrast holds it against."""
        output, decoding = (self.folder / "weights").resolve(), self.recipe.rollout.decoding
        dtype = self.recipe.policy.dtype
        own = None
        if trained:
            kind, _ = sync_kind(self.recipe)
            own = write_weights(trained, output, kind=kind, version=version, dtype=dtype)
        if not isinstance(decoding, Contrast) or decoding.against == "prompt":
            return own
        if decoding.against != "base":
            other = write_weights(Path(decoding.against).expanduser(), output, kind="adapter", version=0, dtype=dtype)
            zeros = output / f"base-{other.name}"
            own = own or Weights("adapter", str(write_zeros(Path(other.folder), zeros)), version, zeros.name)
            return replace(own, against=other.folder)
        assert own is not None  # `check_engine` refuses a base policy that is held against itself
        zeros = write_zeros(Path(own.folder), output / f"base-{own.name}")
        return replace(own, against=str(zeros))

    def _fill(self, journal: Journal, prompts: PromptSet, sampling: Sampling, version: int) -> dict[str, Any]:
        assert self.engine is not None
        done = {place for place, row in enumerate(prompts.rows) if row.id in journal.lines}
        began, tokens = time.monotonic(), 0
        names = [row.id for row in prompts.rows]
        if done:
            log.info("%d of %d prompts were sampled before; the others now", len(done), len(names))
        with progress("sampling", len(names), unit="prompts", start=len(done)) as advance:
            for place, completions in self.engine.sample(prompts.ids, sampling, prompts.contexts, done):
                row, ids = prompts.rows[place], prompts.ids[place]
                journal.append([sampled_line(row, prompts, ids, completions, sampling, version)])
                tokens += sum(len(one.ids) for one in completions)
                advance(1, f"{tokens / (time.monotonic() - began):.0f} tokens/s")
        journal.finish(names)
        whole = sum(len(ids) for line in journal.lines.values() for ids in line["completion_ids"])
        figures = {"tokens": whole, "tokens_per_second": tokens / max(time.monotonic() - began, 1e-9)}
        entropies = [own for line in journal.lines.values() for one in line.get("entropies", []) for own in one]
        return figures | ({"entropy": fmean(entropies)} if entropies else {})


def sampled_line(
    row: Row, prompts: PromptSet, ids: list[int], completions: list[Sampled], sampling: Sampling, version: int
) -> Line:
    """A row as it is written: texts for scorers and people, token ids for the trainer, and how they were drawn."""
    tokenizer = prompts.tokenizer
    texts = [completion_text(tokenizer, ids, one.ids, sampling.stop_ids, sampling.stop) for one in completions]
    chat = is_messages(row.prompt)
    text = row.prompt if chat or isinstance(row.prompt, str) else tokenizer.decode(ids, skip_special_tokens=True)
    line: Line = {
        "id": row.id,
        "prompt": text,
        "completions": [[{"role": "assistant", "content": text}] for text in texts] if chat else texts,
        "prompt_ids": ids,
        "completion_ids": [one.ids for one in completions],
        "sampled_logprobs": [_rounded(one.logprobs) for one in completions],
        "ended": [one.ended for one in completions],
        "policy_version": version,
    }
    if all(one.raw_logprobs is not None for one in completions):
        line["raw_logprobs"] = [_rounded(one.raw_logprobs) for one in completions]
        line["entropies"] = [_rounded(one.entropies) for one in completions]
    return line | ({"meta": row.meta} if row.meta else {})


def _rounded(values: list[float] | None) -> list[float]:
    return [round(value, 6) for value in values or []]


def score(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """`folder`/sampled.jsonl with rewards, as `folder`/rows.jsonl."""
    lines = list(read_lines(folder / "sampled.jsonl"))
    journal = Journal(folder / "rows.jsonl")
    left = [line for line in lines if line["id"] not in journal.lines]
    reward = recipe.rollout.reward
    if left and reward is None:
        log.info("no rollout.reward: the rows have no rewards; `align score` puts them on")
        journal.append(left)
    elif left and reward:
        scorer = load_scorer(reward)
        with progress("scoring", len(lines), unit="lists", start=len(lines) - len(left)) as advance:
            for first in range(0, len(left), SCORED_AT_ONCE):
                block = left[first : first + SCORED_AT_ONCE]
                rewards = iter(rewards_of(scorer, reward, block))
                journal.append([{**line, "rewards": [next(rewards) for _ in line["completions"]]} for line in block])
                advance(len(block))
    if not journal.whole:
        journal.finish([line["id"] for line in lines])
    rewards_ = [reward for line in read_lines(folder / "rows.jsonl") for reward in line.get("rewards", [])]
    return {"mean_reward": fmean(rewards_)} if rewards_ else {}


def rewards_of(scorer: Any, config: Any, block: list[Line]) -> list[float]:
    """The rewards of some lists' completions, one list after the other.

    Args:
        scorer: what `load_scorer` gave for `config`; it may look at a list as a whole, or at a column of the prompts.

    Raises:
        UserError: a prompt has no reference answer, and the scorer needs one.
    """
    column = getattr(config, "answer_column", None)
    found: list[float] = []
    for lines in [[line] for line in block] if getattr(config, "listwise", False) else [block]:
        owners = [line for line in lines for _ in line["completions"]]
        prompts = [line["prompt"] for line in owners]
        texts = [text for line in lines for text in line["completions"]]
        answers = [] if column is None else [[_answer(line, column) for line in owners]]
        with scoring_in_words(config, "rollout.reward.tokens_per_batch={}", goes_on="what is scored already is kept"):
            found += scorer.score(prompts, texts, *answers)
    return found


def _answer(line: Line, column: str) -> Any:
    if line.get("meta", {}).get(column) is None:
        raise UserError(f"data.sources: the prompt {line['id']} has no `{column}`, which rollout.reward compares with")
    return line["meta"][column]


def load_trained(recipe: Recipe, trained: Path | None) -> Policy:
    """The policy as the trainer has it.

    Args:
        trained: the run that trained it, or an adapter; None for the recipe's own start.
    """
    section: dict[str, Any] = {name: value for name, value in recipe.policy if name != "start_run"}
    run = trained if trained and (trained / "recipe.yaml").exists() else None
    if run:
        own = load_recipe(run / "recipe.yaml").policy
        section |= {name: getattr(own, name) for name in ("model", "revision", "adapter", "start_adapter")}
        section["like"] = RunDirectory(run).final_state()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(**section, seed=recipe.train.seed, device=device, total_steps=1, keep_reference=False)
    if run:
        start_from(str(run), policy)
    return policy


def policy_version(run: str | None) -> int:
    """Optimizer steps that made a run's policy, those of the runs it started from included."""
    if run is None:
        return 0
    directory = RunDirectory(run)
    if not directory.summary.exists():
        raise UserError(f"policy.start_run: {run} is no finished run; let `align train` end it")
    steps = read_json(directory.summary)["steps"]
    return steps + policy_version(load_recipe(directory.recipe).policy.start_run)


def describe(figures: dict[str, Any]) -> str:
    """One line about a rollout."""
    parts = [f"{figures['prompts']} prompts sampled from policy version {figures['policy_version']}"]
    if "tokens_per_second" in figures:
        parts.append(f"{figures['tokens']} tokens, {figures['tokens_per_second']:.0f} tokens/s")
    if "entropy" in figures:
        parts.append(f"entropy {figures['entropy']:.3f} nats a token")
    if "agreement" in figures:
        parts.append(f"log-probabilities within {figures['agreement']['max']:.2g} nats of the trainer's")
    if "mean_reward" in figures:
        parts.append(f"mean reward {figures['mean_reward']:+.4f}")
    return "; ".join(parts)
