"""`align evaluate policy`: what happens in which order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from align.data.config import SourceSection
from align.data.schema import Row
from align.data.source_view import mapping_of
from align.data.sources import read_source
from align.errors import UserError
from align.evaluate.in_options import in_options
from align.evaluate.rows import load_run
from align.files import write_json
from align.judging.agreement import agreements
from align.judging.cases import ROWS, Case, build_cases
from align.judging.divergence import kl_figures
from align.judging.figures import judge_figures, label_figures, outcomes, ranked, text_figures
from align.judging.judges import Judge, Opinion
from align.judging.page import write_page
from align.judging.sides import Side, Written, before, default_engine, is_run, read_side, write
from align.judging.tables import show
from align.locks import alone
from align.progress import stage
from align.runs.run_directory import RunDirectory
from align.scoring.cache import RewardCache, default_cache_dir

FILE, PAGE = "evaluate.json", "evaluate.html"
SAMPLING = {"max_tokens": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
"""How a model that is no run samples."""


@dataclass(frozen=True)
class Contest:
    """Who is compared on what."""

    sides: list[str]
    """The policy, what it is compared with, then any others."""
    cases: list[Case]
    written: dict[str, Written]
    left_out: dict[str, int]
    """Prompts that are not among them, by reason."""
    unlabelled: str
    """Why no judge is held against the rows' own grades; empty where they are."""


def evaluate_policy(
    models: Sequence[str],
    *,
    prompts: str,
    judges: Sequence[str],
    against: str = "before",
    output: str | None = None,
    samples: int = 4,
    seed: int = 0,
    engine: str = "auto",
    split: str | None = None,
    ignore: Sequence[str] = (),
    columns: Sequence[str] = (),
    where: str | None = None,
    limit: int | None = None,
    cache: str | None = None,
    use_cache: bool = True,
    trust_remote_code: bool = False,
    allow_code: bool = False,
    console: Console | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Sample both sides, judge them, and print and write who wins by how much: `evaluate.json` in the output folder.

    The same call goes on where it stopped, and ends with the same file.

    Args:
        models: runs, adapters or models; figures are of the first one, and three sides or more are ranked.
        prompts: rows whose prompts are answered.
        judges: what `rewards.read_reward` reads; the first one's figures stand at the top.
        against: `before`, a run, a model, or `rows`: the rows' own completions.
        output: the folder of everything; by default `evaluate` in the first run.
        samples: completions of each prompt and side.
        seed: with which every side samples; of the bootstrap too.
        engine: `transformers`, `vllm`, or `auto`.
        split, ignore, columns, where, limit: which rows, and how they are read.
        cache: folder of rewards and verdicts for other jobs.
        trust_remote_code: run the code that models come with.
        allow_code: consent to functions that a file of a judge names although it may be a stranger's.
        sampling: `max_tokens`, `temperature`, `top_k`, `top_p`; what is None is as in the first run's `sampling`.

    Returns:
        What `evaluate.json` holds; docs/evaluation.md lists its keys.

    Raises:
        UserError: a side, the prompts or a judge cannot be used.
    """
    console = console or Console()
    folder = Path(output) if output else _default_output(models[0])
    store = RewardCache(Path(cache).expanduser() if cache else default_cache_dir()) if use_cache else None
    source = SourceSection(path=prompts, split=split, columns=mapping_of(columns), where=where)
    rows: dict[str, Any] = {"source": source, "limit": limit, "ignore": tuple(ignore)}
    asked = {**_sampling(models[0], sampling), "completions": samples}
    held = {"seed": seed, "output": folder, "engine": default_engine(engine), "trust_remote_code": trust_remote_code}
    with alone(folder, instead="give another --output"):
        opened = [Judge(spec, folder, store, allow_code=allow_code) for spec in dict.fromkeys(judges)]
        contest = _written(models, against, rows, {**held, "sampling": asked})
        opinions = [_asked(judge, contest.cases) for judge in opened]
        said = dict(zip([judge.spec for judge in opened], opinions, strict=True))
        figures = _figures(models[0], against, contest, said, seed)
        for own, judge in zip(figures["judges"], opened, strict=True):
            own["name"] = judge.name
        figures |= _moved(models[0], contest, seed, asked, trust_remote_code)
        figures["sampling"] = asked | {"engine": held["engine"].name}  # type: ignore[attr-defined]
        write_json(folder / FILE, figures)
        write_page(folder / PAGE, figures, contest.cases, opinions[0])
    show(console, figures, contest.unlabelled)
    console.print(f"figures: {folder / FILE}\npage: {folder / PAGE}", highlight=False, soft_wrap=True)
    return figures


def _default_output(model: str) -> Path:
    if not is_run(model):
        raise UserError(f"{model}: no run, in whose folder the figures could go; give --output FOLDER")
    return Path(model) / "evaluate"


def _sampling(model: str, given: dict[str, Any]) -> dict[str, Any]:
    own = RunDirectory(Path(model)).read_recipe().sampling.model_dump(include=set(SAMPLING)) if is_run(model) else {}
    return SAMPLING | own | {name: value for name, value in given.items() if value is not None}


def _written(models: Sequence[str], against: str, rows: dict[str, Any], held: dict[str, Any]) -> Contest:
    """Every side's completions, and the prompts that all of them have answered."""
    if held["sampling"]["temperature"] == 0 and held["sampling"]["completions"] > 1:
        raise UserError("--temperature 0 gives equal completions; give --samples 1, or a higher temperature")
    if len(set(models)) < len(models) or against in models:
        raise UserError(f"{', '.join(models)} against {against}: a side is named twice; name each once")
    if against == "before" and not is_run(models[0]):
        raise UserError(f"{models[0]}: no run, so nothing is known of what it was before; give --against a model")
    with stage("opening the sides"):
        sides = [read_side(name, **rows, **held) for name in models]
        others = {"before": lambda: before(sides[0]), ROWS: lambda: None}
        other: Side | None = others.get(against, lambda: read_side(against, **rows, **held))()
    own, unlabelled = _own_completions(rows, wanted=against == ROWS)
    found = [write(side) for side in (sides[0], other, *sides[1:]) if side is not None]
    asked = found[0].rows
    own = {name: row for name, row in own.items() if name in asked and row.prompt == asked[name].prompt}
    if other is None:
        texts = {name: list(row.completions) for name, row in own.items()}
        found.insert(1, Written(ROWS, texts))
    cases = build_cases(found, own, samples=held["sampling"]["completions"], seed=held["seed"])
    if not cases:
        raise UserError(f"{rows['source'].path}: no prompt has been answered by every side; give shorter prompts")
    if own and not any(case.labels for case in cases):
        unlabelled = "the rows grade no two completions differently"
    left_out = found[0].left_out
    if missing := len(asked) - len(cases):
        left_out = {**left_out, "without an answer of every side": missing}
    return Contest([side.name for side in found], cases, {s.name: s for s in found}, left_out, unlabelled)


def _own_completions(rows: dict[str, Any], *, wanted: bool) -> tuple[dict[str, Row], str]:
    """The rows with their own completions by id, and why there are none where they are not needed."""
    source: SourceSection = rows["source"]
    try:
        with in_options():
            found = read_source(source.path, **source.reading, limit=rows["limit"], ignore=rows["ignore"])
    except UserError as error:
        if wanted:
            raise
        return {}, f"the rows' own completions are not read ({error})"
    return {row.id: row for row in found.rows}, ""


def _asked(judge: Judge, cases: Sequence[Case]) -> list[Opinion]:
    found = judge.opinions(cases)
    judge.close()
    return found


def _figures(
    policy: str, against: str, contest: Contest, judges: dict[str, list[Opinion]], seed: int
) -> dict[str, Any]:
    cases, sides = contest.cases, (contest.sides[0], contest.sides[1])
    each = [
        {
            "judge": spec,
            **judge_figures(cases, own, sides, seed=seed),
            "labels": label_figures(cases, own, seed=seed),
        }
        for spec, own in judges.items()
    ]
    silent = next((own["judge"] for own in each if not own["comparisons"]), None)
    if silent is not None:
        raise UserError(f"--judge {silent}: it gave no verdict at all; look at what it replies, or ask it otherwise")
    verdicts = {spec: outcomes(cases, own, sides) for spec, own in judges.items()}
    told = [
        k for k in range(len(next(iter(verdicts.values())))) if all(own[k] is not None for own in verdicts.values())
    ]
    both = {spec: [own[k] or 0 for k in told] for spec, own in verdicts.items()}
    first = next(iter(judges.values()))
    return {
        "policy": policy,
        "against": against,
        "prompts": len(cases),
        "left_out": contest.left_out,
        "samples": max(len(case.sides[sides[0]]) for case in cases),
        "seed": seed,
        **each[0],
        **text_figures(cases, sides[0]),
        **text_figures(cases, sides[1], "_against"),
        "ended": contest.written[sides[0]].ended,
        "ended_against": contest.written[sides[1]].ended,
        "judges": each,
        "agreement": agreements(both) if told else [],
        "ranking": ranked(cases, first, contest.sides, seed=seed) if len(contest.sides) > 2 else None,
    }


def _moved(policy: str, contest: Contest, seed: int, sampling: dict[str, Any], trusted: bool) -> dict[str, Any]:
    """The divergence of a run from what it began with, of the same prompts."""
    as_it_is = sampling["temperature"] == 1 and not sampling["top_k"] and sampling["top_p"] == 1
    if not is_run(policy) or not as_it_is:
        return {"kl": None, "kl_per_token": None}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    own, _ = load_run(Path(policy), None, device, trust_remote_code=trusted)
    lines = contest.written[policy].lines
    divergence, per_token = kl_figures(own, [lines[case.row.id] for case in contest.cases], seed=seed)
    return {"kl": divergence, "kl_per_token": per_token}
