"""How a command is told of rows."""

from align.command import option, shipped

INPUT = option("path", metavar="INPUT", type=shipped, help="rows: a file, a folder or a hub data set")
CHOICE = (
    option("--split", help="split of a hub data set or file of a folder"),
    option("--ignore", action="append", default=[], metavar="COLUMN", help="leave it out; repeatable"),
    option(
        "--column",
        dest="columns",
        action="append",
        default=[],
        metavar="NAME=PLACE",
        help="read a column from elsewhere: prompt=question, chosen=answers.good; repeatable",
    ),
    option("--where", metavar="CONDITION", help="only the rows for which it holds: \"lang == 'en'\""),
)
GRADES = ("win_probability", "rank", "quantile", "raw")
"""How rewards become grades."""
