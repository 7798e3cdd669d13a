"""Write the page."""

from collections.abc import Sequence
from pathlib import Path

from align.errors import UserError
from align.files import write_text
from align.progress import stage
from align.report.charts import COLOURS
from align.report.measured import read_export
from align.report.page import render
from align.report.reading import read_run
from align.report.refine import write_refined
from align.report.study_page import PAGE, STUDY, read_study, render_study


@stage("writing the report")
def write_report(
    runs: Sequence[str | Path], output: str | Path | None = None, exports: Sequence[str | Path] = ()
) -> Path:
    """Write the page of one run, or of several with their curves laid over each other.

    Args:
        runs: run directories, finished or not; or the folder of one study.
        output: the page's file; None writes report.html into the run directory or, of several, beside the first.
        exports: folders that `align export` wrote, whose comparison with the run the page shows too.

    Returns:
        The file that was written.

    Raises:
        UserError: a folder holds no run or no export, or a file of it cannot be read.
    """
    folders = [Path(run) for run in runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: a run is named twice; name each once")
    if len(folders) > COLOURS:
        raise UserError(f"{len(folders)} runs: more than {COLOURS} curves cannot be told apart; name fewer")
    beside = folders[0] if len(folders) == 1 else folders[0].resolve().parent
    target = Path(output) if output else beside / PAGE
    page = _page(folders, [Path(folder) for folder in exports])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, page)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); give --output another file") from None
    return target


def _page(folders: Sequence[Path], exports: Sequence[Path]) -> str:
    """Of runs, or of a study."""
    studies = [folder for folder in folders if (folder / STUDY).is_file()]
    if studies and len(folders) + len(exports) > 1:
        raise UserError(f"{studies[0]}: a study has a page of its own; name it alone, or runs of it")
    if studies:
        return render_study(studies[0].resolve().name, read_study(studies[0]))
    return render([read_run(folder) for folder in folders], {str(folder): read_export(folder) for folder in exports})


def print_report(
    runs: Sequence[str | Path],
    output: str | Path | None = None,
    exports: Sequence[str | Path] = (),
    *,
    refine: bool = False,
) -> None:
    """Write the page, and the runs' refined schedules where they are asked for, and say where they are."""
    for run in runs if refine else ():
        file = write_refined(run)
        print(f"refined schedule: {file}; the next run takes train.schedule='{{name: refined, path: {file}}}'")
    print(f"report: {write_report(runs, output, exports)}")
