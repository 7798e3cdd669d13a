"""`align rollout`: prompts -> rows of completions, with rewards where the recipe names a scorer."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from align.cluster.connect import Cluster, on_cluster, worked
from align.data.row_numbers import WEIGHT
from align.data.schema import TEMPLATE_OPTIONS, Row, is_messages
from align.data.tools import TOOLS
from align.disk import free, in_words
from align.errors import UserError
from align.evaluate.sampling import Sampled, completion_text
from align.files import read_object, write_json
from align.manifest import file_digest
from align.model.load import LoadOptions
from align.model.policy import Policy, load_policy
from align.progress import progress
from align.recipe import Recipe, read_recipe
from align.recipe.idle import say_idle
from align.rollout.agreement import check_agreement
from align.rollout.cluster_engine import ClusterEngine
from align.rollout.config import Contrast
from align.rollout.engine import Engine, Sampling, Weights
from align.rollout.engines import check_engine, open_engine, sync_kind
from align.rollout.journal import Journal, Line, read_lines
from align.rollout.prompts import PromptSet, describe_prompts, read_prompts
from align.rollout.weights import remove_older, write_weights, write_zeros
from align.runs.log import start_log
from align.runs.memory import scoring_in_words
from align.runs.run_directory import RunDirectory
from align.runs.scorers import load_scorer
from align.runs.start import start_from
from rewards.types import Asked, Running

log = logging.getLogger("align")

OF_A_TOKEN = 20
"""Bytes of a sampled token in a file of rows: its text, its number and its log-probability."""
SCORED_AT_ONCE = 32
"""Lists that a scorer gets at a time; a kill costs no more."""


WRITES = {"score": "rows.jsonl", "sample": "sampled.jsonl"}
"""What each stage writes, the last stage first."""


class Stages:
    """The finished stages of an iteration, with their figures and the digest of what they wrote: `stages.json`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "stages.json"

    def read(self) -> dict[str, Any]:
        """Stage -> figures."""
        return read_object(self.path) if self.path.exists() else {}

    def check(self) -> None:
        """Forget a stage whose file is not as it left it, and say so; what a later one was made of does not matter."""
        done = self.read()
        for name, file in WRITES.items():
            path = self.path.with_name(file)
            if name in done and _is_whole(path, done[name].get("sha256")):
                break
            if done.pop(name, None):
                log.warning("%s: missing or damaged; it is made again", path)
                path.unlink(missing_ok=True)
                write_json(self.path, done)

    def do(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a stage unless it is finished; its figures, with the seconds that it took."""
        done = self.read()
        if name not in done:
            began = time.monotonic()
            figures = stage()
            digest = file_digest(self.path.with_name(WRITES[name]))
            done |= {name: {**figures, "seconds": time.monotonic() - began, "sha256": digest}}
            write_json(self.path, done)
        return done[name]


def _is_whole(file: Path, digest: str | None) -> bool:
    """Whether a file is there, with the digest that it had if that was kept."""
    return file.is_file() and digest in (None, file_digest(file))


def rollout(recipe: Recipe, *, ray: str | None = None, actors: int | None = None, gpus: float | None = None) -> Path:
    """Sample the recipe's policy on the prompts of `data.sources`, into `output`/rollout/rows.jsonl.

    The same call on the same folder goes on where it stopped.

    Args:
        ray: address of a Ray cluster whose actors run the engine and the scorer, or `local`; the rows stay the same.
        actors, gpus: how many actors, and of how many GPUs; by default what the cluster holds.

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
    with on_cluster(ray, actors, gpus) as cluster, run.alone():
        return _rollout(recipe, run, cluster)


def _rollout(recipe: Recipe, run: RunDirectory, cluster: Cluster | None) -> Path:
    run.open(recipe)
    start_log(run, main=True)
    say_idle(recipe)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    folder = run.path / "rollout"
    stages = Stages(folder)
    stages.check()
    if "score" not in stages.read():
        prompts = read_prompts(recipe)
        log.info("%s", describe_prompts(prompts))
        if len({source.weight for source in recipe.data.sources}) > 1:
            log.info("data.sources: every prompt is sampled once, whatever its source's weight")
        sampler = Sampler(recipe, run.path, cluster)
        try:
            figures = stages.do("sample", lambda: sampler.sample(folder, prompts, seed=recipe.train.seed))
        finally:
            sampler.close()
        figures |= stages.do("score", lambda: score(recipe, folder, cluster))
        log.info("%s", describe(figures))
    log.info("written to %s", folder / "rows.jsonl")
    return folder / "rows.jsonl"


class Sampler:
    """The engine of a recipe, started when it is first needed, and the policy that it samples from."""

    def __init__(self, recipe: Recipe, folder: Path, cluster: Cluster | None = None) -> None:
        """Args:
        folder: where weights for the engine and its log go.
        cluster: whose actors run it, in place of this process.
        """
        self.recipe, self.folder, self.cluster = recipe, folder, cluster
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
            adaptive_temperature=section.adaptive_temperature,
            stop=section.stop,
            stop_ids=(*prompts.ends, *section.stop_ids),
        )
        start = self.recipe.policy.start_run or self.recipe.policy.start_adapter
        trained = trained or (Path(start).expanduser() if start else None)
        version = policy_version(self.recipe.policy.start_run) if version is None else version
        figures: dict[str, Any] = {"prompts": len(prompts.rows), "left_out": prompts.left_out}
        figures["text_left_out"] = prompts.text_left_out
        if not journal.whole:
            self._check_room(folder, len(prompts.rows) - len(journal.lines))
            figures |= self._synchronise(trained, version, prompts, sampling)
            figures |= self._fill(journal, prompts, sampling, version)
        return figures | {"policy_version": version}

    def _check_room(self, folder: Path, prompts: int) -> None:
        """Warn where the disk cannot hold completions that all are as long as they may be."""
        section = self.recipe.rollout
        most = prompts * section.completions * section.max_tokens * OF_A_TOKEN * len(WRITES)
        if most > (have := free(folder)):
            log.warning(
                "%s: completions of %d tokens each would take %s, and %s are free; make room, or set another `output`",
                *(folder, section.max_tokens, in_words(most), in_words(have)),
            )

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
        self.engine = self.engine or self._opened()
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

    def _opened(self) -> Engine:
        if self.cluster:
            return ClusterEngine(self.recipe, self.folder, self.cluster)
        return open_engine(self.recipe, self.folder)

    def _write_weights(self, trained: Path | None, version: int) -> Weights | None:
        """What the engine is to load, if anything: the policy, and the adapter that a contrast holds it against."""
        output, decoding = (self.folder / "weights").resolve(), self.recipe.rollout.decoding
        held: dict[str, Any] = {"dtype": self.recipe.policy.dtype, "trusted": self.recipe.policy.trust_remote_code}
        own = None
        if trained:
            kind, _ = sync_kind(self.recipe)
            own = write_weights(trained, output, kind=kind, version=version, **held)
        if not isinstance(decoding, Contrast) or decoding.against == "prompt":
            return own
        if decoding.against != "base":
            other = write_weights(Path(decoding.against).expanduser(), output, kind="adapter", version=0, **held)
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
    line |= {TEMPLATE_OPTIONS: row.template_options} if chat and row.template_options else {}
    line |= {TOOLS[0]: row.tools} if row.tools else {}
    line |= {WEIGHT: row.loss_weight} if row.loss_weight != 1 else {}
    return line | ({"meta": row.meta} if row.meta else {})


def _rounded(values: list[float] | None) -> list[float]:
    return [round(value, 6) for value in values or []]


def score(recipe: Recipe, folder: Path, cluster: Cluster | None = None) -> dict[str, Any]:
    """`folder`/sampled.jsonl with rewards, as `folder`/rows.jsonl.

    A block of lists follows from all of them, whatever is there already: what is scored beside them moves last digits.
    """
    lines = list(read_lines(folder / "sampled.jsonl"))
    journal = Journal(folder / "rows.jsonl")
    left = [line for line in lines if line["id"] not in journal.lines]
    reward = recipe.rollout.reward
    if left and reward is None:
        log.info("no rollout.reward: the rows have no rewards; `align score` puts them on")
        journal.append(left)
    elif left and reward:
        missing = {line["id"] for line in left}
        every = (lines[first : first + SCORED_AT_ONCE] for first in range(0, len(lines), SCORED_AT_ONCE))
        blocks = (block for block in every if any(line["id"] in missing for line in block))
        devices = int(isinstance(reward, Running))
        with progress("scoring", len(lines), unit="lists", start=len(lines) - len(left)) as advance:
            for block, rewards in worked(cluster, partial(_start_rewards, reward), blocks, devices=devices):
                given = iter(rewards)
                scored = [{**line, "rewards": [next(given) for _ in line["completions"]]} for line in block]
                own = [line for line in scored if line["id"] in missing]
                journal.append(own)
                advance(len(own))
    if not journal.whole:
        journal.finish([line["id"] for line in lines])
    rewards_ = [reward for line in read_lines(folder / "rows.jsonl") for reward in line.get("rewards", [])]
    return {"mean_reward": fmean(rewards_)} if rewards_ else {}


def _given(line: Line) -> dict[str, Any]:
    """What a row gives a chat template besides its messages."""
    tools = {TOOLS[0]: line[TOOLS[0]]} if line.get(TOOLS[0]) else {}
    return {**line.get(TEMPLATE_OPTIONS, {}), **tools}


def _start_rewards(reward: Any) -> Callable[[list[Line]], list[float]]:
    return partial(rewards_of, load_scorer(reward), reward)


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
        prompts = [Asked.of(line["prompt"], _given(line)) for line in owners]
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
    section, like = recipe.policy, None
    run = trained if trained and (trained / "recipe.yaml").exists() else None
    if run:
        own = read_recipe(run / "recipe.yaml").policy
        names = ("model", "revision", "adapter", "start_adapter")
        section = section.model_copy(update={name: getattr(own, name) for name in names})
        like = RunDirectory(run).final_state()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = LoadOptions(seed=recipe.train.seed, device=device, total_steps=1, like=like)
    policy = load_policy(section, options, keep_reference=False)
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
    steps = read_object(directory.summary, "steps")["steps"]
    return steps + policy_version(read_recipe(directory.recipe).policy.start_run)


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
