"""`align study` and `align sweep`."""

from typing import Any

from align.command import ALLOW_CODE, TRUST_REMOTE_CODE, Command, option, positive


def check_study(given: dict[str, Any]) -> None:
    """Refuse what cannot work before torch is loaded: the recipe of every run is read."""
    from align.studies import plan  # with pydantic, which `align --help` does without

    (plan.plan_sweep if "vary" in given else plan.plan_study)(**given)


COMMANDS = (
    Command(
        "study",
        "a recipe under several settings and seeds: a table with intervals, a plot and a page",
        "align.studies.run:study",
        (
            option("file", metavar="FILE", help="a YAML of recipe, vary and seeds, or the name of one that ships"),
            option("output", nargs="?", metavar="OUT", help="its folder (default: `output` of the file)"),
            option(
                "--set",
                dest="settings",
                action="append",
                default=[],
                metavar="key=value",
                help="a recipe's key for all runs; repeatable",
            ),
            TRUST_REMOTE_CODE,
            ALLOW_CODE,
        ),
        goes_on=True,
        before=check_study,
    ),
    Command(
        "sweep",
        "a recipe of your own over a grid of values, by successive halving if asked for",
        "align.studies.run:sweep",
        (
            option("base", metavar="RECIPE.yaml", help="a file, or the name of a recipe that ships"),
            option(
                "settings",
                nargs="*",
                default=[],
                metavar="key=value",
                help="for all runs; `output` is the sweep's folder (default: the recipe's with -sweep behind it)",
            ),
            option(
                "--vary",
                action="append",
                required=True,
                metavar="key=V1,V2",
                help="a key and its values; repeatable, every combination is run",
            ),
            option("--seeds", type=positive, default=1, metavar="N", help="seeds 0 to N-1 of each (default 1)"),
            option("--baseline", metavar="ARM", help="compare with this arm, seed by seed (default: the first)"),
            option("--halving", type=positive, metavar="ETA", help="keep one in ETA, and train it ETA times as long"),
            option("--by", metavar="FIGURE", help="with --halving: the held-out figure that decides"),
            TRUST_REMOTE_CODE,
            ALLOW_CODE,
        ),
        goes_on=True,
        before=check_study,
    ),
)
