"""`align report`."""

from align.command import Command, option

COMMANDS = (
    Command(
        "report",
        "one self-contained HTML page of a run, of several beside each other, or of a study",
        "align.report.write:print_report",
        (
            option("runs", nargs="+", metavar="RUN", help="a run directory, finished or not, or a study's folder"),
            option(
                "--export",
                dest="exports",
                action="append",
                default=[],
                metavar="FOLDER",
                help="an export of the run, whose comparison with it is shown too; repeatable",
            ),
            option(
                "--refine",
                action="store_true",
                help="write refined_schedule.json into the run too, for `train.schedule: {name: refined, path: RUN}`",
            ),
            option("--output", metavar="FILE", help="the page (default: report.html in the run directory)"),
        ),
    ),
)
