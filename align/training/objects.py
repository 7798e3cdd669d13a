"""A caller's rows, model and tokenizer become files of the run, so that it goes on, and every command reads it."""

import filecmp
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, DatasetDict, IterableDatasetDict
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align.errors import UserError
from align.model.given import check_model, has_weights_of, is_same_tokenizer
from align.model.load import model_folder, read_tokenizer
from align.runs.run_directory import RunDirectory
from rewards.files import file_digest

log = logging.getLogger("align")

Write = Callable[[RunDirectory], None]
DTYPES = ("float32", "bfloat16", "float16")
LINKED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*processor*.json")
"""Files of a model's folder that are not its tokenizer's."""


def rows_file(rows: Any, output: str, part: str) -> tuple[str, Write | None]:
    """Where rows are read from, and what writes them there.

    Args:
        rows: dicts, a `datasets.Dataset`, or the path of rows that are on disk.
        part: train_dataset or eval_dataset.

    Raises:
        UserError: they are none of these.
    """
    if isinstance(rows, str | Path):
        return str(rows), None
    if isinstance(rows, DatasetDict | IterableDatasetDict | dict):
        names = ", ".join(map(str, rows))
        raise UserError(f"{part}: {type(rows).__name__} of {names or 'nothing'}; give one split of it, a list of rows")
    table = isinstance(rows, Dataset)
    if not table and not isinstance(rows, Iterable):
        raise UserError(f"{part}: {type(rows).__name__} holds no rows; give dicts, a datasets.Dataset, or a path")
    file = Path(output) / "rows" / f"{part.partition('_')[0]}.{'parquet' if table else 'jsonl'}"
    fill = _write_table if table else _write_lines

    def write(run: RunDirectory) -> None:
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_suffix(".tmp")
        fill(rows, temporary, part)
        if file.exists() and filecmp.cmp(file, temporary, shallow=False):
            temporary.unlink()
        else:
            temporary.replace(file)

    return str(file), write


def _write_table(rows: Dataset, file: Path, part: str) -> None:
    rows.with_format(None).to_parquet(file)


def _write_lines(rows: Iterable[Any], file: Path, part: str) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for line in _lines(rows, part):
            lines.write(line + "\n")


def _lines(rows: Iterable[Any], part: str) -> Iterator[str]:
    number = 0
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(
                f"{part}, row {number}: {type(row).__name__}, not a dict of columns (of a pandas.DataFrame give "
                "datasets.Dataset.from_pandas(frame))"
            )
        if odd := [key for key in row if not isinstance(key, str)]:
            raise UserError(f"{part}, row {number}: the column's name {odd[0]!r} is no text")
        try:
            yield json.dumps(row, default=_plain)
        except (TypeError, ValueError) as error:
            raise UserError(f"{part}, row {number}: {error}; give text, numbers, lists and dicts of them") from None
    if not number:
        raise UserError(f"{part}: no rows; a generator gives its rows once, so make it anew")


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch as Python's own; tuples are lists already."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


class GivenModel:
    """A model or tokenizer that is an object: which folder has the same, and what is written where none has."""

    def __init__(self, model: Any, tokenizer: Any, *, output: str, origin: str | None) -> None:
        """Args:
        origin: the model that the recipe names.

        Raises:
            UserError: the objects are none of the kind, or cannot be read back.
        """
        self.adapter: TemporaryDirectory[str] | None = None
        """Where the adapter of a PeftModel is until the run is open."""
        if isinstance(model, PeftModel):
            self.adapter, model = _taken_apart(model)
        if model is not None:
            check_model(model)
        self.model: PreTrainedModel | None = model
        self.base = Path(output) / "base"
        self.start_adapter = Path(output) / "start_adapter"
        self.origin = _folder(self.model.config._name_or_path if self.model is not None else origin)
        self.tokenizer = _tokenizer(tokenizer, self.origin)
        weights = self.origin is not None and (self.model is None or has_weights_of(self.model, self.origin))
        self.linked = self.origin if weights else None
        """Whose weights need not be written again."""

    def sections(self) -> dict[str, Any]:
        """The recipe's `policy`, as far as the objects decide it."""
        found: dict[str, Any] = {"model": str(self.folder), "revision": None, "trust_remote_code": False}
        if self.model is not None:
            dtype = str(self.model.dtype).removeprefix("torch.")
            if dtype not in DTYPES:
                raise UserError(f"model: its weights are {dtype}; give them in {', '.join(DTYPES)}")
            found |= {"dtype": dtype, "quantization": None, "attention": None}
        if self.adapter is not None:
            found |= {"start_adapter": str(self.start_adapter)}
        return found

    @property
    def folder(self) -> Path:
        """What the recipe names as its model: the object's own origin where that has the same in all, or a copy."""
        if self.linked and is_same_tokenizer(self.tokenizer, read_tokenizer(self.linked, trust_remote_code=False)):
            return self.linked
        return self.base

    def write(self, run: RunDirectory) -> None:
        """Put the base and the adapter into the run, or make sure that those that are there are the same.

        Raises:
            UserError: the run began with others.
        """
        if self.folder == self.base:
            _put(run, self.base, self._write_base, "model")
        if self.adapter is not None:
            saved = self.adapter.name
            _put(run, self.start_adapter, lambda empty: copy_files(Path(saved), empty), "model's adapter")

    def _write_base(self, folder: Path) -> None:
        if self.linked:
            for pattern in LINKED:
                for file in self.linked.glob(pattern):
                    (folder / file.name).symlink_to(file.resolve())
        elif self.model is not None:
            log.info("the model's weights are in no folder: a copy goes to %s, which the commands read", self.base)
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if not is_same_tokenizer(self.tokenizer, read_tokenizer(folder, trust_remote_code=False)):
            raise UserError("tokenizer: read from the files that it saves it is another one; save it to a folder first")


def _put(run: RunDirectory, folder: Path, write: Callable[[Path], None], what: str) -> None:
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    same = folder.exists() and _digest(folder) == _digest(temporary)
    if not same and run.has_work():
        shutil.rmtree(temporary)
        raise UserError(
            f"{run.path}: the {what} is not the one that this run began with (an object that has trained is another); "
            "give that, or give `output` a new folder"
        )
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _digest(folder: Path) -> list[tuple[str, str]]:
    """Of weights, tokenizer and template; configurations also say which version wrote them."""
    files = [*folder.glob("*.safetensors"), *folder.glob("tokenizer.json"), *folder.glob("*.jinja")]
    return [(file.name, file_digest(file)) for file in sorted(files)]


def _folder(name: str | None) -> Path | None:
    """A model's folder by its name, where it is here or in the hub's cache."""
    if not name:
        return None
    try:
        return model_folder(name)
    except UserError:
        return None


def _tokenizer(tokenizer: Any, origin: Path | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        if origin is None:
            raise UserError("tokenizer: the model is of no folder that has one; give the tokenizer beside the model")
        return read_tokenizer(origin, trust_remote_code=False)
    own = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
    if not isinstance(own, PreTrainedTokenizerBase):
        raise UserError(
            f"tokenizer: {type(tokenizer).__name__} is no transformers tokenizer; give what "
            f"{AutoTokenizer.__name__}.from_pretrained returns"
        )
    return own


def _taken_apart(model: PeftModel) -> tuple[TemporaryDirectory[str], Any]:
    """An adapter's files, and the base that it was on, now free of it."""
    if len(model.active_adapters) != 1:
        raise UserError(f"model: {len(model.active_adapters)} adapters are active; set_adapter makes it one")
    (active,) = model.active_adapters
    folder = TemporaryDirectory()
    model.save_pretrained(folder.name, selected_adapters=[active])
    inside = Path(folder.name) / active
    if inside.is_dir():  # where PEFT puts one that is not called default
        copy_files(inside, Path(folder.name))
        shutil.rmtree(inside)
    tuned: Any = model.base_model
    try:
        return folder, tuned.unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        kind = str(model.peft_config[active].peft_type)
        raise UserError(f"model: PEFT cannot take an adapter of type {kind} off its base ({error})") from error


def copy_files(source: Path, folder: Path) -> None:
    """Copy a folder's own files into one that is there."""
    for file in source.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
