"""`align COMMAND ...`: parse, dispatch, and turn a user's mistake into one sentence and exit code 2."""

import argparse
import errno
import importlib
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from align.errors import UserError
from align.shipped import with_shipped_paths

PATH_ERRORS = (PermissionError, IsADirectoryError, NotADirectoryError, FileNotFoundError, FileExistsError)
READ = ("input", "model", "reward")
"""Arguments that may be rows or a model that ship."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `align` command; exits with 0, 2 for a user's mistake, 1 for any other failure."""
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if rest and "overrides" not in parsed:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes positional arguments in one run only; an option may stand between overrides
        parsed.overrides += rest
    try:
        if "overrides" in parsed:
            parsed.recipe = _recipe(parsed, sys.argv[1:] if arguments is None else arguments)
        if parsed.run in (_score, _chat, _evaluate_rows, _evaluate_rewards):
            vars(parsed).update({name: with_shipped_paths(vars(parsed)[name]) for name in READ if name in parsed})
        if parsed.run in MODULES:
            _load_libraries(MODULES[parsed.run])
        parsed.run(parsed)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from here" if parsed.run in (_train, _rollout, _annotate, _score) else ""
        print(f"align: stopped{goes_on}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = _of_user(error)
        if sentence is None:
            raise
        print(f"align: {sentence}", file=sys.stderr)
        sys.exit(2)


def _of_user(error: Exception) -> str | None:
    """What to say of a user's mistake; None of any other failure."""
    rewards: Any = sys.modules.get("rewards.types")  # there as soon as anything scores
    if isinstance(error, UserError) or (rewards and isinstance(error, rewards.ScorerError)):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error.filename or 'the disk'}: no space is left; make room, and the same command goes on"
    if isinstance(error, PATH_ERRORS) and error.filename:
        return f"{error.filename}: {error.strerror}; give a path that can be written"
    if isinstance(error, RuntimeError | MemoryError):
        from align.runs.memory import in_one_sentence  # with torch, which such an error has loaded

        return in_one_sentence(error)
    return None


def _recipe(parsed: argparse.Namespace, words: Sequence[str]) -> Any:
    """The recipe with its overrides; a mistake in it is answered before torch is imported, which takes seconds."""
    from align.recipe import load_recipe, recipe_keys

    if option := next((word for word in parsed.overrides if word.startswith("-")), None):
        raise UserError(f"{_as_override(option, words, recipe_keys())}")
    return load_recipe(parsed.recipe, parsed.overrides)


def _as_override(option: str, words: Sequence[str], keys: frozenset[str]) -> str:
    """What to say of an option that another tool would take: `--learning_rate 5e-6`."""
    from align.recipe.other_tools import override

    flag, equals, value = option.partition("=")
    after = [*words, ""][words.index(option) + 1]
    given = value if equals else after if after and not after.startswith("--") and "=" not in after else None
    said = flag if given is None else f"{flag}{equals or ' '}{given}"
    meant = override(flag, given, keys) or "such as `train.learning_rate=1e-4`"
    return f"`{said}`: a recipe's keys are laid over as key=value, without dashes: {meant}"


def _load_libraries(module: str) -> None:
    """What the command needs and takes seconds to import, torch above all: said before it begins."""
    from align.progress import stage

    with stage(f"align {_version()}: loading torch and transformers"):
        import datasets
        import transformers

        importlib.import_module(module)
    # No bars of other libraries between ours: loading weights is short, and tokenising shows on a terminal only.
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _version() -> str:
    from importlib.metadata import version  # takes as long as the rest of `--help`

    return version("align-lm")


class _Version(argparse.Action):
    """Says the version, which is looked up when it is asked for."""

    def __call__(self, *_: Any) -> None:
        print(f"align {_version()}")
        sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="align", description="Preference alignment of language models.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for name, run, help_text in (
        ("inspect", _inspect, "the resolved recipe, the data audit and a few rows with their masks; no training"),
        ("annotate", _annotate, "what frozen models compute per row (token rewards, CHES, ...), into the cache"),
        ("train", _train, "train a policy or a reward model; a run that is already there goes on"),
        ("rollout", _rollout, "sample completions of the prompts in data.sources, and score them"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("recipe", metavar="RECIPE.yaml", help="a file, or the name of a recipe that ships")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.learning_rate=1e-4")
        command.set_defaults(run=run)
    commands.choices["inspect"].add_argument("--rows", type=_count, default=2, help="rows to show (default 2)")

    _add_init(commands)

    export = commands.add_parser("export", help="an adapter or, with --merge, a full checkpoint of a run")
    export.add_argument("run_directory", metavar="RUN", help="a run directory, or an adapter's folder")
    export.add_argument("output", metavar="OUTPUT")
    export.add_argument("--merge", action="store_true", help="base and adapter in one checkpoint")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="what weights are stored in (default: as trained)"
    )
    export.add_argument("--push", metavar="HUB_NAME", help="upload the result to the hub as well")
    export.set_defaults(run=_export)

    _add_score(commands)

    evaluate = commands.add_parser(
        "evaluate", help="measure a policy or rewards against graded rows, or count who wins"
    )
    what = evaluate.add_subparsers(required=True, metavar="WHAT")
    rows = what.add_parser("rows", help="ranking metrics of a policy against the rows' grades")
    rows.add_argument("input", metavar="INPUT", help="rows: a file, a folder or a hub data set")
    rows.add_argument("--model", required=True, metavar="RUN_OR_PATH", help="a run directory, or a model")
    _add_choice_of_rows(rows)
    own = "(default: as the run's recipe has it"
    ways = ("win_probability", "rank", "quantile", "raw")
    rows.add_argument("--grades", choices=ways, help=f"how rewards become grades {own}, else win_probability)")
    rows.add_argument("--max-length", type=_positive, help=f"tokens of prompt and completion {own}, else 1024)")
    rows.add_argument(
        "--append-eos",
        action=argparse.BooleanOptionalAction,
        help=f"whether completions end with an end token {own}, else they do)",
    )
    rows.add_argument("--chat-template", metavar="FILE", help="a Jinja file in place of the tokenizer's own")
    rows.add_argument("--tokens-per-batch", type=_positive, default=8192)
    rows.add_argument("--json", metavar="OUT", help="write every figure to this file")
    rows.set_defaults(run=_evaluate_rows)

    _add_evaluate_rewards(what)
    _add_evaluate_winrate(what)

    _add_report(commands)
    _add_chat(commands)

    doctor = commands.add_parser("doctor", help="what this machine can do, and what to install for the rest")
    doctor.add_argument("--install", choices=("rollout", "rollout-cpu"), help="install this extra")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_choice_of_rows(command: argparse.ArgumentParser) -> None:
    command.add_argument("--split", help="split of a hub data set or file of a folder")
    command.add_argument("--ignore", action="append", default=[], metavar="COLUMN", help="leave it out; repeatable")


def _positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return int(text)


def _count(text: str) -> int:
    """A whole number of 0 or more."""
    return 0 if text == "0" else _positive(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _not_negative(text: str) -> float:
    """A number of 0 or more."""
    if not 0 <= _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of 0 or more")
    return float(text)


def _share(text: str) -> float:
    """A number above 0 and up to 1."""
    if not 0 < _number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0 and up to 1")
    return float(text)


def _add_init(commands: Any) -> None:
    from align.recipe import init

    own = commands.add_parser("init", help="write a commented recipe for your own model and rows")
    tasks = ", ".join(init.TASKS)
    own.add_argument("task", nargs="?", default="preference", choices=tuple(init.TASKS), metavar="TASK", help=tasks)
    own.add_argument("--model", default=init.MODEL, metavar="M", help="a local folder or a hub name")
    own.add_argument("--data", default=init.DATA, metavar="ROWS", help="a file, a folder or a hub data set")
    own.add_argument("--output", metavar="FILE", help="the recipe's file (default TASK.yaml)")
    own.set_defaults(run=_init)


def _add_score(commands: Any) -> None:
    score = commands.add_parser("score", help="put rewards and grades on rows with one or more scorers")
    score.add_argument("input", metavar="INPUT", help="rows: a file, a folder or a hub data set")
    score.add_argument("output", metavar="OUTPUT", help="a .jsonl, .jsonl.gz or .parquet file")
    spec = "a reward model's folder or hub name, a YAML file, or YAML such as '{name: length, max: 200}'; repeatable"
    score.add_argument("--reward", action="append", required=True, metavar="SPEC", help=spec)
    score.add_argument("--combine", default="weighted_sum", choices=("weighted_sum", "and"), help="of several rewards")
    score.add_argument("--grades", default="win_probability", choices=("win_probability", "rank", "quantile", "raw"))
    _add_choice_of_rows(score)
    score.add_argument("--on-error", default="stop", choices=("stop", "collect"), help="what a malformed row does")
    score.add_argument("--exact", action="store_true", help="one text per forward pass: identical in any batch, slower")
    score.add_argument("--tokens-per-batch", type=_positive, metavar="N", help="of one forward pass (default 8192)")
    score.add_argument(
        "--window", type=_positive, default=1024, help="completions sorted and written together (default 1024)"
    )
    score.add_argument("--cache", metavar="FOLDER", help="where rewards are kept for other jobs")
    score.add_argument("--no-cache", action="store_true", help="neither read nor keep rewards there")
    score.set_defaults(run=_score)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report", help="one self-contained HTML page of a run, or of several beside each other"
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, finished or not")
    report.add_argument("--output", metavar="FILE", help="the page (default: report.html in the run directory)")
    report.set_defaults(run=_report)


def _add_chat(commands: Any) -> None:
    text = "one prompt to a run's policy and to what it was before training, beside each other"
    chat = commands.add_parser("chat", help=text, description=text)
    chat.add_argument("model", metavar="RUN_OR_PATH", help="a run directory, an adapter's folder, or a model")
    chat.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="answer this and end; repeatable (default: typed)"
    )
    chat.add_argument("--system", metavar="TEXT", help="a system message before every conversation")
    chat.add_argument("--plain", action="store_true", help="continue the text, without the model's chat template")
    chat.add_argument("--chat-template", metavar="FILE", help="a Jinja file in place of the run's own")
    own = "(default: as the run's recipe has it"
    chat.add_argument("--max-tokens", type=_positive, metavar="N", help=f"tokens of an answer {own}, else 256)")
    chat.add_argument("--temperature", type=_not_negative, help=f"0 takes the likeliest token {own}, else 1)")
    chat.add_argument("--top-k", type=_count, help=f"only so many of the likeliest tokens, 0 for all {own}, else 0)")
    chat.add_argument("--top-p", type=_share, help=f"only the likeliest tokens of this probability {own}, else 1)")
    chat.add_argument("--seed", type=_count, help=f"the same for both {own}, else 0)")
    chat.add_argument("--json", action="store_true", help="a line of JSON for each prompt")
    chat.set_defaults(run=_chat)


def _add_evaluate_rewards(what: Any) -> None:
    rewards = what.add_parser("rewards", help="accuracy and calibration of a scorer, or of the rows' own rewards")
    rewards.add_argument("input", metavar="INPUT", help="rows with grades: a file, a folder or a hub data set")
    rewards.add_argument("--reward", metavar="SPEC", help="a scorer; without it the rows' `rewards` are measured")
    _add_choice_of_rows(rewards)
    rewards.add_argument("--by", default="subset", metavar="COLUMN", help="column of the groups (default subset)")
    rewards.add_argument("--ties", default="half", choices=("half", "wrong"), help="what a tie counts (default half)")
    rewards.add_argument("--benchmark", choices=("rewardbench", "rewardbench2", "rm-bench"), help="its own arithmetic")
    rewards.add_argument("--bins", type=_positive, default=10, help="bins of the reliability table (default 10)")
    rewards.add_argument("--limit", type=_positive, help="read only this many rows")
    rewards.add_argument("--json", metavar="OUT", help="write every figure to this file")
    rewards.set_defaults(run=_evaluate_rewards)


def _add_evaluate_winrate(what: Any) -> None:
    winrate = what.add_parser("winrate", help="win rate of one model over a baseline, from pairwise annotations")
    winrate.add_argument("annotations", metavar="ANNOTATIONS", help="AlpacaEval's annotations, or preferences as JSONL")
    winrate.add_argument("--length-controlled", action="store_true", help="the win rate at equal lengths too")
    winrate.add_argument("--gamed", metavar="FILE", help="AlpacaEval's df_gamed.csv, for the leaderboard's figure")
    winrate.add_argument("--json", metavar="OUT", help="write every figure to this file")
    winrate.set_defaults(run=_evaluate_winrate)


def _init(parsed: argparse.Namespace) -> None:
    from align.recipe.init import init, left_to_set

    path = init(parsed.task, parsed.output, model=parsed.model, data=parsed.data)
    left = left_to_set(path)
    before = f"set {', '.join(left)} there, then " if left else ""
    print(f"{path}: {before}`align inspect {path}` and `align train {path}`")


def _inspect(parsed: argparse.Namespace) -> None:
    from align.training.inspect import inspect_recipe

    inspect_recipe(parsed.recipe, rows=parsed.rows)


def _annotate(parsed: argparse.Namespace) -> None:
    from align.training.annotate import annotate

    annotate(parsed.recipe)


def _train(parsed: argparse.Namespace) -> None:
    from align.training.train import train

    train(parsed.recipe)


def _rollout(parsed: argparse.Namespace) -> None:
    from align.rollout.sample import rollout

    rollout(parsed.recipe)


def _export(parsed: argparse.Namespace) -> None:
    from align.export.export import export

    export(parsed.run_directory, parsed.output, merge=parsed.merge, dtype=parsed.dtype, push=parsed.push)


def _evaluate_rows(parsed: argparse.Namespace) -> None:
    from align.evaluate.rows import evaluate_rows

    evaluate_rows(
        parsed.input,
        model=parsed.model,
        split=parsed.split,
        ignore=parsed.ignore,
        grades=parsed.grades,
        max_length=parsed.max_length,
        append_eos=parsed.append_eos,
        chat_template=parsed.chat_template,
        tokens_per_batch=parsed.tokens_per_batch,
        json_path=parsed.json,
    )


def _evaluate_rewards(parsed: argparse.Namespace) -> None:
    from align.evaluate.rewards import evaluate_rewards

    evaluate_rewards(
        parsed.input,
        reward=parsed.reward,
        split=parsed.split,
        ignore=parsed.ignore,
        by=parsed.by,
        ties=parsed.ties,
        benchmark=parsed.benchmark,
        bins=parsed.bins,
        limit=parsed.limit,
        json_path=parsed.json,
    )


def _evaluate_winrate(parsed: argparse.Namespace) -> None:
    from align.evaluate.annotations import evaluate_winrate

    evaluate_winrate(parsed.annotations, controlled=parsed.length_controlled, gamed=parsed.gamed, json_path=parsed.json)


def _chat(parsed: argparse.Namespace) -> None:
    from align.evaluate.chat import chat

    chat(
        parsed.model,
        prompts=parsed.prompt,
        system=parsed.system,
        plain=parsed.plain,
        chat_template=parsed.chat_template,
        seed=parsed.seed,
        as_json=parsed.json,
        max_tokens=parsed.max_tokens,
        temperature=parsed.temperature,
        top_k=parsed.top_k,
        top_p=parsed.top_p,
    )


def _report(parsed: argparse.Namespace) -> None:
    from align.report import write_report

    print(f"report: {write_report(parsed.runs, parsed.output)}")


def _score(parsed: argparse.Namespace) -> None:
    from align.scoring import score_rows

    score_rows(
        parsed.input,
        parsed.output,
        rewards=parsed.reward,
        combination=parsed.combine,
        grades=parsed.grades,
        split=parsed.split,
        ignore=parsed.ignore,
        on_error=parsed.on_error,
        window=parsed.window,
        exact=parsed.exact,
        tokens_per_batch=parsed.tokens_per_batch,
        cache=parsed.cache,
        use_cache=not parsed.no_cache,
    )


def _doctor(parsed: argparse.Namespace) -> None:
    from align import doctor

    if parsed.install:
        doctor.install(parsed.install)
    else:
        doctor.print_report()


MODULES = {
    _inspect: "align.training.inspect",
    _annotate: "align.training.annotate",
    _train: "align.training.train",
    _rollout: "align.rollout.sample",
    _export: "align.export.export",
    _evaluate_rows: "align.evaluate.rows",
    _evaluate_rewards: "align.evaluate.rewards",
    _evaluate_winrate: "align.evaluate.annotations",
    _chat: "align.evaluate.chat",
    _report: "align.report",
    _score: "align.scoring",
    _doctor: "align.doctor",
}
"""Command -> what it runs, where that needs torch."""

if __name__ == "__main__":
    main()
