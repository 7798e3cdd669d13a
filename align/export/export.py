"""`align export`: what a run trained, for the programs that models run in, compared with what was trained."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from align.errors import UserError
from align.export.combine import combine
from align.export.compare import compare, refuse_other
from align.export.drop import drop_entries
from align.export.exported import describe
from align.export.formats import FORMATS, Format, check_fits, check_format
from align.export.heldout import HeldOut, calibration, held_out
from align.export.made import Made
from align.export.merging import load_float32, merged_model, probe_ids, read_probe, stored_dtype
from align.export.model_card import model_card
from align.export.options import check_places
from align.export.trained import Trained, find_trained, read_tokenizer_of, source_of
from align.export.vllm_engine import check_reads, opened
from align.files import replaced_folder, write_json
from align.locks import alone_on
from align.model.load import HUB_ERRORS, first_line, loading
from align.progress import stage
from align.runs.digests import Digests

log = logging.getLogger("align")

FIGURES = "export.json"
COMBINED, DROPPED = ".combined", ".dropped"


def export(
    run_or_adapter: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    merge: bool = False,
    dtype: str | None = None,
    average: Sequence[str | Path] = (),
    extrapolate: float = 0.0,
    drop: float | None = None,
    seed: int = 0,
    lists: int = 16,
    engine: str | None = None,
    tolerance: float | None = None,
    push: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write what was trained as a folder for the programs that models run in, with a model card.

    A merge adds the adapter to a fresh float32 copy of the base, compares the log-probabilities (a reward model's
    rewards) of a probe text before and after, and then rounds. What was written is read again by its engine and
    compared with the trained policy on held-out lists of the run; `export.json` has the figures.

    Args:
        run_or_adapter: A run directory, or a folder with a PEFT adapter or a whole model.
        output: A new or empty folder; it appears whole or not at all.
        to: A name of `FORMATS`; by default "peft", and "transformers" for a whole model.
        merge: The same as `to="transformers"`.
        dtype: What weights are stored in, of those that the format has; by default that of the run's policy, else the
            base's own, for models, and unchanged for adapters.
        average: Other runs of the same base, with which the mean of all is exported.
        extrapolate: How much further than training went, as a share of its way: ExPO's alpha.
        drop: The share of the entries of an adapter's second factors that become 0; the others are scaled up for it.
        seed: Of what is dropped.
        lists: Held-out lists that are compared; 0 compares a probe text.
        engine: "vllm" has vLLM read it again, in float32, in place of the format's own engine.
        tolerance: Nats by which log-probabilities may differ on average; by default that of format and dtype.
        push: Hub name to upload the folder to, too.
        trust_remote_code: Run the code that the model comes with; what the run's recipe says of it is no consent.

    Returns:
        The output folder.

    Raises:
        UserError: Nothing trained is there, the output is taken, the base is missing or does not fit the adapter, a
            library is missing, or the export is another model than what was trained.

    Source: ours
    """
    if merge and to not in (None, "transformers"):
        raise UserError(f"--merge is --to transformers; leave it out with --to {to}")
    check_places({"run_or_adapter": run_or_adapter, "output": output})
    trained, *others = (
        find_trained(Path(path), trust_remote_code=trust_remote_code) for path in (run_or_adapter, *average)
    )
    whole = trained.base is None or merge
    form = FORMATS[to or ("transformers" if whole else "peft")]
    check_format(form, dtype)
    check_fits(form, trained)
    if engine == "vllm":
        check_reads(form, trained)
    output = Path(output)
    with alone_on(output, instead="give another output folder"), replaced_folder(output) as partial:
        if others or extrapolate:
            trained = combine([trained, *others], partial / COMBINED, extrapolate=extrapolate)
        tokenizer = read_tokenizer_of(trained)
        held = None if trained.outputs else _held_out(trained, form, tokenizer, lists)
        source = trained if drop is None else drop_entries(trained, partial / DROPPED, share=drop, seed=seed)
        made, differences = _write(form, source, tokenizer, partial, output.name, dtype)
        found = {
            "format": form.name,
            "dtype": _stored(form, made),
            "average": [str(path) for path in average],
            "extrapolate": extrapolate,
            "drop": drop,
            **differences,
        }
        if held is not None:
            found |= _compared(form, held, made, tolerance, engine)
        _record(partial, output.name, trained, form, found)
    print(describe(output, form=form, base=trained.base, outputs=trained.outputs, found=found))
    if push:
        _push(output, push)
    return output


def _record(folder: Path, name: str, trained: Trained, form: Format, found: dict[str, Any]) -> None:
    """Leave the export alone in its folder, with its figures, digests and card."""
    for passing in (COMBINED, DROPPED):
        shutil.rmtree(folder / passing, ignore_errors=True)
    write_json(folder / FIGURES, found)
    Digests(folder).note_all()  # of all but the card, which its owner goes on writing
    card = model_card(name=name, base=trained.base, form=form, found=found, outputs=trained.outputs, **trained.run)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_files(trained: Trained, output: Path, *, merge: bool, dtype: str | None) -> None:
    """The files that an engine of a run loads, without card or comparison, into a folder that is there.

    Raises:
        UserError: the adapter does not fit its base, or merging would change the policy.

    Source: ours
    """
    form = FORMATS["transformers" if merge or trained.base is None else "peft"]
    _write(form, trained, read_tokenizer_of(trained), output, output.name, dtype)


def _write(
    form: Format, trained: Trained, tokenizer: Any, folder: Path, name: str, dtype: str | None
) -> tuple[Made, dict[str, float]]:
    """Write a format's files.

    Returns:
        What was written, and by how much a probe text's log-probabilities (rewards) moved: `merge_difference` in
        float32 and, of what transformers reads, `stored_difference` at most and `stored_mean_difference`.
    """
    if form.of_adapter:
        made = Made(trained, tokenizer, folder, name, dtype or form.default)
        form.function()(made)
        return made, {}
    model, moved, exact = merged_model(trained, tokenizer)
    differences = {f"{key}_difference": value for key, value in moved.items()}
    own = dtype or form.default or stored_dtype(trained, None)
    rows = calibration(trained) if form.calibrates else ()
    made = Made(trained, tokenizer, folder, name, own, model, rows)
    del model
    with stage("writing the model"):
        form.function()(made)
    made = Made(trained, tokenizer, folder, name, own)
    if form.name == "transformers":
        again = read_probe(load_float32(folder, trained), probe_ids(tokenizer), trained)
        off = (exact - again).abs()
        differences |= {"stored_difference": off.max().item(), "stored_mean_difference": off.mean().item()}
    return made, differences


def _held_out(trained: Trained, form: Format, tokenizer: Any, lists: int) -> HeldOut | None:
    """What the export is compared on; None for an adapter whose base is not here, which then is copied as it is."""
    if form.name == "peft":
        try:
            source_of(trained)
        except UserError as error:
            log.warning("the adapter is not compared: %s", error)
            return None
    return held_out(trained, tokenizer, lists=lists)


def _compared(form: Format, held: HeldOut, made: Made, tolerance: float | None, engine: str | None) -> dict[str, Any]:
    """The figures of an export that is within its bound."""
    with stage("reading it again"), loading(made.folder, "is written and cannot be read again, so that it is not kept"):
        if engine == "vllm":
            with opened(made, held) as vllm:
                found = compare(held, vllm)
        else:
            found = compare(held, form.reader()(made.folder, made.trained))
    bound = form.tolerance[_stored(form, made)] if tolerance is None else tolerance
    refuse_other(found, bound)
    return found | {"tolerance": bound}


def _stored(form: Format, made: Made) -> str:
    """What weights are stored in; of an adapter as it is, float32, in which it is trained."""
    return made.dtype or "float32"


@stage("uploading")
def _push(folder: Path, name: str) -> None:
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except HUB_ERRORS as error:
        raise UserError(f"{folder} is written, but {name} cannot be pushed: {first_line(error)}") from error
