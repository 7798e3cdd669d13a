"""`align evaluate policy`."""

from align.command import (
    ALLOW_CODE,
    TRUST_REMOTE_CODE,
    Command,
    count,
    not_negative,
    option,
    positive,
    share,
    shipped,
)
from align.data.options import CHOICE
from align.evaluate.options import LIMIT

OWN = "(default: as the first run's recipe has it"

COMMANDS = (
    Command(
        "evaluate policy",
        "who writes better: sample two policies or more, let judges decide, and say how sure that is",
        "align.judging.command:evaluate_policy",
        (
            option(
                "models", nargs="+", metavar="RUN_OR_PATH", type=shipped, help="a run, or a model; several are ranked"
            ),
            option(
                "--against",
                default="before",
                metavar="SIDE",
                type=shipped,
                help="`before` (what the run began with), a run, a model, or `rows` (default before)",
            ),
            option("--prompts", required=True, metavar="INPUT", type=shipped, help="rows whose prompts are answered"),
            option(
                "--judge",
                dest="judges",
                action="append",
                required=True,
                metavar="SPEC",
                help="as `align score --reward`, such as '{name: judge, model: M, mode: pairwise}'; repeatable",
            ),
            option("--output", metavar="FOLDER", help="where samples, verdicts and figures go (default RUN/evaluate)"),
            option("--samples", type=positive, default=4, metavar="K", help="completions of each prompt (default 4)"),
            option("--max-tokens", type=positive, metavar="N", help=f"of a completion {OWN}, else 256)"),
            option("--temperature", type=not_negative, help=f"0 takes the likeliest token {OWN}, else 1)"),
            option("--top-k", type=count, help=f"only so many of the likeliest tokens, 0 for all {OWN}, else 0)"),
            option("--top-p", type=share, help=f"only the likeliest tokens of this probability {OWN}, else 1)"),
            option("--seed", type=count, default=0, help="of samples, bootstrap and choices (default 0)"),
            option("--engine", default="auto", choices=("auto", "transformers", "vllm"), help="what samples"),
            *CHOICE,
            LIMIT,
            option("--cache", metavar="FOLDER", help="where rewards and verdicts are kept for other jobs"),
            option("--no-cache", dest="use_cache", action="store_false", help="neither read nor keep them there"),
            TRUST_REMOTE_CODE,
            ALLOW_CODE,
        ),
        goes_on=True,
    ),
)
