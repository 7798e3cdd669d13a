"""`align evaluate`, `align gate` and `align chat`."""

from argparse import BooleanOptionalAction

from align.command import ALLOW_CODE, TRUST_REMOTE_CODE, Command, count, not_negative, option, positive, share, shipped
from align.data.options import CHOICE, GRADES, INPUT
from align.recipe.options import check_models

MODEL = {"metavar": "RUN_OR_PATH", "type": shipped}
TEMPLATE = {"metavar": "FILE"}
LIMIT = option("--limit", type=positive, metavar="N", help="read only this many rows")
JSON = option("--json", dest="json_path", metavar="OUT", help="write every figure to this file")
OWN = "(default: as the run's recipe has it"

COMMANDS = (
    Command("evaluate", "measure a policy or rewards against graded rows, or count who wins"),
    Command(
        "evaluate rows",
        "ranking metrics of a policy against the rows' grades",
        "align.evaluate.rows:evaluate_rows",
        (
            INPUT,
            option("--model", required=True, **MODEL, help="a run directory, or a model"),
            *CHOICE,
            option("--grades", choices=GRADES, help=f"how rewards become grades {OWN}, else win_probability)"),
            option("--max-length", type=positive, help=f"tokens of prompt and completion {OWN}, else 1024)"),
            option(
                "--append-eos",
                action=BooleanOptionalAction,
                help=f"whether completions end with an end token {OWN}, else they do)",
            ),
            option("--chat-template", **TEMPLATE, help="a Jinja file in place of the tokenizer's own"),
            option("--tokens-per-batch", type=positive, default=8192, help="of one forward pass (default 8192)"),
            option(
                "--variants",
                metavar="COLUMN",
                help="column with lists of other wordings of the prompt: what they change",
            ),
            LIMIT,
            JSON,
            TRUST_REMOTE_CODE,
            ALLOW_CODE,
        ),
        before=check_models,
    ),
    Command(
        "evaluate rewards",
        "accuracy and calibration of a scorer, or of the rows' own rewards",
        "align.evaluate.rewards:evaluate_rewards",
        (
            option("path", metavar="INPUT", type=shipped, help="rows with grades: a file, a folder or a hub data set"),
            option("--reward", metavar="SPEC", help="a scorer; without it the rows' `rewards` are measured"),
            *CHOICE,
            option("--by", default="subset", metavar="COLUMN", help="column of the groups (default subset)"),
            option("--ties", default="half", choices=("half", "wrong"), help="what a tie counts (default half)"),
            option(
                "--benchmark",
                choices=("rewardbench", "rewardbench2", "rm-bench", "rag-rewardbench"),
                help="its own arithmetic",
            ),
            option("--buckets", metavar="COLUMN", help="a column of numbers (difficulties): figures in five parts"),
            option("--bins", type=positive, default=10, help="bins of the reliability table (default 10)"),
            LIMIT,
            JSON,
            ALLOW_CODE,
        ),
        before=check_models,
    ),
    Command(
        "evaluate winrate",
        "win rate of one model over a baseline, from pairwise annotations",
        "align.evaluate.annotations:evaluate_winrate",
        (
            option("path", metavar="ANNOTATIONS", help="AlpacaEval's annotations, or preferences as JSONL"),
            option(
                "--length-controlled", dest="controlled", action="store_true", help="the win rate at equal lengths too"
            ),
            option("--gamed", metavar="FILE", help="AlpacaEval's df_gamed.csv, for the leaderboard's figure"),
            JSON,
        ),
    ),
    Command(
        "evaluate benchmarks",
        "lm-evaluation-harness before and after training, and which tasks the policy forgot (extra lm-eval)",
        "align.evaluate.benchmarks:evaluate_benchmarks",
        (
            option("model", **MODEL, help="a run directory, an adapter's folder, or a model"),
            option("--tasks", nargs="+", required=True, metavar="TASK", help="of the harness, or of --include-path"),
            option("--include-path", metavar="DIR", help="a folder of task files of your own, with data that is here"),
            option(
                "--num-fewshot", type=count, metavar="N", help="examples before each question (default: the task's)"
            ),
            option("--limit", type=positive, metavar="N", help="read only so many documents of each task"),
            option("--batch-size", type=positive, default=8, metavar="N", help="texts of a forward pass (default 8)"),
            option("--apply-chat-template", action="store_true", help="ask through the model's chat template"),
            option("--chat-template", **TEMPLATE, help="a Jinja file in place of the run's own"),
            option(
                "--json",
                dest="json_path",
                metavar="OUT",
                help="write every figure here (default: benchmarks.json of the run)",
            ),
            TRUST_REMOTE_CODE,
            ALLOW_CODE,
        ),
        before=check_models,
        goes_on=True,
    ),
    Command(
        "gate",
        "check figures of runs, evaluations, exports and studies: exit code 0 where all requirements hold, else 3",
        "align.evaluate.gate:gate",
        (
            option(
                "paths", nargs="+", metavar="RUN|FOLDER|FILE", help="a run, another folder with results, a JSON file"
            ),
            option(
                "--require",
                action="append",
                required=True,
                metavar="'FIGURE > NUMBER'",
                help="with >, >=, <, <=, == or !=; repeatable: 'win_rate.low > 0.5', 'best_logprob_change > -10'",
            ),
            option("--json", dest="json_path", metavar="OUT", help="write what held to this file"),
        ),
        light=True,
    ),
    Command(
        "evaluate weights",
        "what training did to each matrix: norms of the update, its stable rank, new directions",
        "align.export.weights:evaluate_weights",
        (
            option("model", metavar="RUN", type=shipped, help="a run directory, or an adapter's folder"),
            option("--directions", type=positive, default=10, help="leading singular vectors of a matrix (default 10)"),
            option(
                "--similarity",
                type=share,
                default=0.6,
                help="one is an intruder where no cosine with the start's reaches this (default 0.6)",
            ),
            JSON,
            TRUST_REMOTE_CODE,
        ),
    ),
    Command(
        "chat",
        "one prompt to a run's policy and to what it was before training, beside each other",
        "align.evaluate.chat:chat",
        (
            option("model", **MODEL, help="a run directory, an adapter's folder, or a model"),
            option(
                "--prompt",
                dest="prompts",
                action="append",
                default=[],
                metavar="TEXT",
                help="answer this and end; repeatable (default: typed)",
            ),
            option("--system", metavar="TEXT", help="a system message before every conversation"),
            option("--plain", action="store_true", help="continue the text, without the model's chat template"),
            option("--chat-template", **TEMPLATE, help="a Jinja file in place of the run's own"),
            option("--max-tokens", type=positive, metavar="N", help=f"tokens of an answer {OWN}, else 256)"),
            option("--temperature", type=not_negative, help=f"0 takes the likeliest token {OWN}, else 1)"),
            option("--top-k", type=count, help=f"only so many of the likeliest tokens, 0 for all {OWN}, else 0)"),
            option("--top-p", type=share, help=f"only the likeliest tokens of this probability {OWN}, else 1)"),
            option("--seed", type=count, help=f"the same for both {OWN}, else 0)"),
            option("--json", dest="as_json", action="store_true", help="a line of JSON for each prompt"),
            TRUST_REMOTE_CODE,
        ),
        before=check_models,
    ),
)
