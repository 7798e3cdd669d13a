"""`align report`."""

from align.command import Command, option

COMMANDS = (
    Command(
        "report",
        "one self-contained HTML page of a run, or of several beside each other",
        "align.report.write:print_report",
        (
            option("runs", nargs="+", metavar="RUN", help="a run directory, finished or not"),
            option("--output", metavar="FILE", help="the page (default: report.html in the run directory)"),
        ),
    ),
)
