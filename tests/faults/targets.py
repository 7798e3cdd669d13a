"""What is fuzzed: every reader of a stranger's bytes, with small inputs to begin from. A target reads what it is given,
or raises what a user is told in words; anything else that it raises is a fault.

`test_fuzz.py` runs the same targets on drawn inputs, and `fuzz.py` on inputs that coverage guides.
"""

import contextlib
import gzip
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from drawn import as_line, drawn_bytes, drawn_row
from rich.console import Console
from tiny_models import letters

from align.data.admit import grade_row
from align.data.findings import _read as read_findings
from align.data.formats import read_prompt, read_row
from align.data.gather import Found, gather
from align.data.paths import path_of
from align.data.row_store import decoded, encoded
from align.data.schema import BadRow, Row, UnusableRow
from align.data.source_view import SourceView, typed
from align.data.sources import stream_rows
from align.data.texts import Template
from align.data.tokenize import Reading, encode_prompt, tokenize_rows
from align.data.where import parse_where
from align.errors import UserError
from align.evaluate.annotations import evaluate_winrate
from align.importing.run import _written, plan_of
from align.manifest import MANIFEST, Damaged, check
from align.recipe.recipe import read_recipe
from align.report.reading import read_run
from align.scoring.cache import RewardCache
from rewards import read_reward
from rewards.types import ScorerError

ROOT = Path(__file__).parents[2]
TOLD = (UserError, BadRow, UnusableRow)
"""What a reader may raise."""
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


class Target(NamedTuple):
    """What reads, what it may raise besides, and how its input is made of bytes."""

    read: Callable[[Any], object]
    made: Callable[[bytes], Any]
    """Drawn bytes -> an input; `fuzz.py` gives them to a target of bytes as they are."""
    begin: list[bytes]
    """Inputs to begin from, of a target that reads bytes as they are; else none."""
    told: tuple[type[Exception], ...] = TOLD


@cache
def folder() -> Path:
    """Where files are written to be read, in memory where that is a file system."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="align-fuzz-", dir=memory if memory.is_dir() else None))


@cache
def rows() -> list[dict[str, Any]]:
    """A row of every format, and some that rows of no format of their own have."""
    found = [json.loads(line) for file in sorted((ROOT / "data/formats").glob("*.jsonl")) for line in _first(file)]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    beside = {
        "weight": 2,
        "margin": 1.5,
        "tools": [{"name": "f"}],
        "chat_template_kwargs": {"x": 1},
        "meta": {},
        "id": 7,
    }
    more = {"system": "Be brief.", "context": "c", "score_chosen": 2, "score_rejected": 1, "attributes": [{"a": 1}]}
    return [*found, pair | beside, pair | more, {"prompt_ids": [1, 2], "completion_ids": [3], "token_weights": [[1.0]]}]


def _first(file: Path, count: int = 2) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()[:count]


def checked(row: Row) -> Row:
    """A row that was read keeps its promises: numbers are finite, texts are Unicode, and it is the same from a file."""
    assert all(map(math.isfinite, [*(row.grades or ()), *(row.rewards or ()), row.loss_weight, row.margin or 0.0]))
    json.dumps([row.id, row.prompt, row.completions, row.meta], ensure_ascii=False, default=str).encode()
    again = decoded(encoded(row))
    assert (again.prompt, again.completions, again.grades) == (row.prompt, row.completions, row.grades)
    return row


def read_rows_of(raw: Any) -> None:
    for reader in (read_row, read_prompt):
        with contextlib.suppress(*TOLD):
            checked(reader(raw, "rows.jsonl", 1))


def read_gathered(data: bytes) -> None:
    """Neighbours that are joined and trees that are split, by a mapping of columns."""
    view = SourceView({"prompt": "prompt.text", "chosen": "answers[0]"} if data[:1] < b"\x20" else {})
    parts = [drawn_row(data[k : k + 8], rows()) for k in range(0, 24, 8)]
    seen = [view.of(own) if isinstance(own, dict) and view.columns else own for own in parts]
    for one in gather(Found("rows.jsonl", k + 1, own) for k, own in enumerate(seen)):
        if one.refused is None:
            read_rows_of(one.raw)


@cache
def tokenizer() -> Any:
    return letters(template=CHAT)


def read_tokens(raw: Any) -> None:
    """A row up to its token ids, as training and sampling have them."""
    row = grade_row(read_row(raw, "rows.jsonl", 1), grades="win_probability", min_completions=1)
    tokenize_rows([row], tokenizer=tokenizer(), reading=Reading(max_length=64))
    encode_prompt(replace(row, completions=()), tokenizer())


def read_file(name: str, data: bytes) -> None:
    file = folder() / name
    file.write_bytes(data)
    for one in stream_rows(str(file)):
        if isinstance(one.row, Row):
            checked(one.row)
        elif isinstance(one.row, BadRow):
            one.row.message(one.source, one.number).encode()


def read_described(data: bytes) -> None:
    """A folder's `dataset_info.json` beside a file that it may describe."""
    place = folder() / "described"
    place.mkdir(exist_ok=True)
    (place / "rows.jsonl").write_bytes(b"".join(map(as_line, rows()[:3])))
    (place / "dataset_info.json").write_bytes(data)
    for one in stream_rows(str(place)):
        assert one.source


def read_condition(data: bytes) -> None:
    where = parse_where(data.decode("utf-8", "replace"))
    for row in rows()[:5]:
        where.holds(typed(row))


def read_recipe_file(data: bytes) -> None:
    file = folder() / "recipe.yaml"
    file.write_bytes(data)
    read_recipe(file)


def read_override(data: bytes) -> None:
    read_recipe(ROOT / "recipes/dpo.yaml", [data.decode("utf-8", "replace")])


def read_specification(data: bytes) -> None:
    read_reward("{" + data.decode("utf-8", "replace"))


def read_annotations(data: bytes) -> None:
    file = folder() / "annotations.jsonl"
    file.write_bytes(data)
    evaluate_winrate(str(file), console=Console(file=io.StringIO()))


def read_template(data: bytes) -> None:
    template = Template(tokenizer(), data.decode("utf-8", "replace"), {"enable_thinking": False})
    template.before_answer([{"role": "user", "content": "q"}])


def import_file(ending: str, data: bytes) -> None:
    file = folder() / f"config{ending}"
    file.write_bytes(data)
    _written(plan_of(file, "dpo"), None)


def read_kept(data: bytes) -> None:
    """Parts of caches: findings and the manifest of a preparation, the table of rewards."""
    place = folder() / "kept"
    place.mkdir(exist_ok=True)
    for name in ("findings.json", MANIFEST, "rewards.sqlite"):
        (place / name).write_bytes(data)
    read_findings(place / "findings.json")
    with contextlib.suppress(Damaged):
        check(place)
    cache = RewardCache(place)
    cache.read([b"k" * 16], cache.state())


def read_run_of(data: bytes) -> None:
    """What is left of a run: its recipe, its metrics, its summary."""
    place = folder() / "run"
    place.mkdir(exist_ok=True)
    recipe, metrics, summary, environment = (data.split(b"\n---\n", 3) + [b"{}"] * 3)[:4]
    contents = {
        "recipe.yaml": recipe,
        "metrics.jsonl": metrics,
        "summary.json": summary,
        "environment.json": environment,
    }
    for name, content in contents.items():
        (place / name).write_bytes(content)
    read_run(place)


def table(ending: str) -> list[bytes]:
    """A few rows as Parquet or Arrow."""
    found = pyarrow.table({"prompt": ["q", "r"], "chosen": ["a", None], "rejected": ["b", "c"], "x": [[1], []]})
    stream = io.BytesIO()
    if ending == ".parquet":
        pyarrow.parquet.write_table(found, stream)
    else:
        with pyarrow.ipc.new_stream(stream, found.schema) as writer:
            writer.write_table(found)
    return [stream.getvalue()]


def texts(*patterns: str) -> list[bytes]:
    """The beginnings of files of the repository."""
    return [file.read_bytes()[:4000] for pattern in patterns for file in sorted(ROOT.glob(pattern)) if file.is_file()]


def _of_bytes(read: Callable[[bytes], object], begin: list[bytes], *more: type[Exception]) -> Target:
    return Target(read, partial(drawn_bytes, texts=begin), begin, (*TOLD, *more))


def _of_rows(read: Callable[[Any], object]) -> Target:
    return Target(read, partial(drawn_row, rows=rows()), [])


CELLS = b'prompt,chosen,rejected,weight\n"a, b",x,y,2\nq,"[{""role"": ""user"", ""content"": ""q""}]",z,nan\n'
CONDITIONS = [b"lang == 'en' and votes >= 3", b"not (`chosen-rating` > 3.5 or x.y is None)", b"x in ['a', 'b']"]
JUDGED = [
    as_line(own) for own in ({"preference": 1.5, "output_1": "a", "output_2": "b", "index": 0}, {"winner": "tie"})
]
SHELL = [
    b"python -m trl dpo --model_name_or_path m --dataset_name d \\\n  --beta 0.1 # no\n",
    b"swift rlhf --rlhf_type dpo --model m --dataset d",
]
SCRIPT = [
    b"from trl import DPOTrainer, DPOConfig\nc = DPOConfig(output_dir='o', beta=0.1)\nDPOTrainer('m', args=c).train()\n"
]
YAMLS = [
    b"base_model: m\nrl: dpo\ndatasets:\n- path: d\n  type: chatml.intel\nlearning_rate: 1e-5\n",
    b"stage: dpo\nmodel_name_or_path: m\ndataset: d\npref_beta: 0.1\n",
]
INFO = [
    b'{"a": {"file_name": "rows.jsonl", "columns": {"prompt": "prompt"}, "tags": {"role_tag": "role"}}}',
]


@cache
def targets() -> dict[str, Target]:
    """Every target by its name."""
    lines = [as_line(row) for row in rows()]
    made = {
        "row": _of_rows(read_rows_of),
        "tokens": _of_rows(read_tokens),
        "gathered": Target(read_gathered, lambda data: data, [bytes([k, k]) for k in range(0, 90, 9)]),
        "jsonl": _of_bytes(partial(read_file, "rows.jsonl"), lines),
        "json": _of_bytes(
            partial(read_file, "rows.json"), [b"[" + b",".join(lines[:2]) + b"]", b'{"train": [' + lines[0] + b"]}"]
        ),
        "gzip": _of_bytes(partial(read_file, "rows.jsonl.gz"), [gzip.compress(lines[0], mtime=0)]),
        "csv": _of_bytes(partial(read_file, "rows.csv"), [CELLS, CELLS.decode().encode("utf-16")]),
        "tsv": _of_bytes(partial(read_file, "rows.tsv"), [CELLS.replace(b",", b"\t")]),
        "parquet": _of_bytes(partial(read_file, "rows.parquet"), table(".parquet")),
        "arrow": _of_bytes(partial(read_file, "rows.arrow"), table(".arrow")),
        "described": _of_bytes(read_described, INFO),
        "where": _of_bytes(read_condition, CONDITIONS, ValueError),
        "path": _of_bytes(
            lambda data: path_of(data.decode("utf-8", "replace")), [b"a.b[0].c", b"a[].text"], ValueError
        ),
        "recipe": _of_bytes(read_recipe_file, texts("recipes/*.yaml")),
        "override": _of_bytes(
            read_override, [b"data.sources.0.path=x", b"train.learning_rate=1e-4", b"score={name: mean}"]
        ),
        "specification": _of_bytes(
            read_specification, [b"name: length, max: 200}", b"scorer: {name: length}, weight: 2}"], ScorerError
        ),
        "annotations": _of_bytes(read_annotations, JUDGED),
        "template": _of_bytes(read_template, [CHAT.encode(), *texts("recipes/templates/*.jinja")], ValueError),
        "kept": _of_bytes(read_kept, [b'{"findings": {}, "digest": ""}', b'{"a": [1, "b"]}', b"SQLite format 3\x00"]),
        "run": _of_bytes(read_run_of, [b'policy: {}\n---\n{"step": 1, "loss": 0.5}\n\n---\n{}\n---\n{}']),
        "import_yaml": _of_bytes(partial(import_file, ".yaml"), YAMLS),
        "import_json": _of_bytes(
            partial(import_file, ".json"), [b'{"stage": "dpo", "model_name_or_path": "m", "dataset": "d"}']
        ),
        "import_shell": _of_bytes(partial(import_file, ".sh"), SHELL),
        "import_script": _of_bytes(partial(import_file, ".py"), SCRIPT),
    }
    return made


def attempt(target: Target, given: Any) -> None:
    """Read one input; what a user is told is no fault.

    Raises:
        Exception: whatever else the reader raises.
    """
    with contextlib.suppress(*target.told), contextlib.redirect_stderr(io.StringIO()):
        target.read(given)


def each() -> Iterator[tuple[str, Target]]:
    yield from targets().items()
