"""`align score`."""

from align.cluster.options import RAY
from align.command import ALLOW_CODE, Command, option, positive
from align.data.options import CHOICE, GRADES, INPUT
from align.recipe.options import check_models

SPEC = "a reward model's folder or hub name, a YAML file, or YAML such as '{name: length, max: 200}'; repeatable"

COMMANDS = (
    Command(
        "score",
        "put rewards and grades on rows with one or more scorers",
        "align.scoring.command:score_rows",
        (
            INPUT,
            option("output", metavar="OUTPUT", help="a .jsonl, .jsonl.gz or .parquet file"),
            option("--reward", dest="rewards", action="append", required=True, metavar="SPEC", help=SPEC),
            option(
                "--combine",
                dest="combination",
                default="weighted_sum",
                choices=("weighted_sum", "and"),
                help="of several rewards (default weighted_sum)",
            ),
            option(
                "--grades",
                default="win_probability",
                choices=GRADES,
                help="how rewards become grades (default win_probability)",
            ),
            *CHOICE,
            option("--on-error", default="stop", choices=("stop", "collect"), help="what a malformed row does"),
            option("--exact", action="store_true", help="one text per forward pass: identical in any batch, slower"),
            option("--tokens-per-batch", type=positive, metavar="N", help="of one forward pass (default 8192)"),
            option(
                "--window",
                type=positive,
                default=1024,
                help="completions sorted and written together (default 1024)",
            ),
            option("--cache", metavar="FOLDER", help="where rewards are kept for other jobs"),
            option("--no-cache", dest="use_cache", action="store_false", help="neither read nor keep rewards there"),
            ALLOW_CODE,
            *RAY,
        ),
        goes_on=True,
        before=check_models,
    ),
)
