"""Folders and files of strangers before every command that reads them: nothing of theirs runs unasked, and what cannot
be read is one sentence.

Each hostile thing is made here, and met by every command that reads such a thing (`python tests/faults/table.py
hostile`). A pair fails if the thing's code has run without consent, if there is a traceback, if
a refusal is not one sentence or does not say what it should, or if it takes too long.
"""

import contextlib
import io
import json
import logging
import os
import pickle
import re
import shutil
import signal
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow
import torch
import yaml
from peft import LoraConfig, get_peft_model
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from tiny_models import letters, llama, saved
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from align.cli import main
from align.data import files
from align.manifest import seal
from align.runs.checkpoints import numbered, step_of
from align.runs.run_directory import RunDirectory
from rewards import rendering

SECONDS = 60
"""Of computing, that a pair may take: a clock would judge the machine's other work."""
TRUST, ALLOW = "--trust-remote-code", "--allow-code"


class World:
    """What is honest: models, rows, a recipe, a finished run."""

    def __init__(self, root: Path) -> None:
        self.root, self.marker = root, root / "ran"
        rendering.SECONDS, rendering.ROOM = 1.0, 2**30  # a tenth of what it is, so that the table takes minutes
        files.UNPACKED_ROWS = 2**30
        chat = letters(template="{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}")
        self.base = Path(saved(root / "base", LlamaForCausalLM(llama()), chat))
        self.reward = Path(saved(root / "reward", LlamaForSequenceClassification(llama(pad_token_id=0))))
        adapted = get_peft_model(
            LlamaForCausalLM.from_pretrained(self.base), LoraConfig(r=2, target_modules=["q_proj"])
        )
        torch.nn.init.normal_(adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        self.adapter = root / "adapter"
        adapted.save_pretrained(self.adapter)
        self.rows = root / "rows.jsonl"
        lists = [{"prompt": "ab"[k % 2] + " c ", "completions": ["a b", "c d e"], "grades": [1.0, k]} for k in (0, 2)]
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in lists * 4))
        self.messages = root / "messages.jsonl"
        asked = [{"role": "user", "content": "a b"}]
        sides = [[{"role": "assistant", "content": own}] for own in ("c", "d e")]
        self.messages.write_text(json.dumps({"prompt": asked, "completions": sides, "grades": [1.0, 0.0]}) + "\n")
        self.tree = {
            "output": str(root / "run"),
            "policy": {"model": str(self.base), "adapter": {"name": "lora", "rank": 2}},
            "data": {"sources": [str(self.rows)], "eval_fraction": 0.25, "max_length": 64},
            "objective": {"name": "logistic"},
            "train": {"steps": 1, "lists_per_step": 2, "threads": 1},
            "sampling": {"prompts": 1, "max_tokens": 2, "token_lists": 0},
            "rollout": {"engine": "transformers", "completions": 2, "max_tokens": 2},
            "reference": {"cache_dir": str(root / "cache")},
        }
        self.recipe = self.write_recipe(root / "recipe.yaml")
        assert self.call(["train", str(self.recipe)]).code == 0
        self.run = root / "run"

    def write_recipe(self, path: Path, **sections: object) -> Path:
        """The honest recipe with sections laid over it."""
        tree = dict(self.tree)
        for name, section in sections.items():
            old = tree.get(name)
            tree[name] = old | section if isinstance(old, dict) and isinstance(section, dict) else section
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
        return path

    def code(self, more: str = "") -> str:
        """Python that leaves the marker."""
        return f"open({str(self.marker)!r}, 'w').close()\n{more}"

    def call(self, words: list[str]) -> "Outcome":
        """A command in this process; what it says, and how it ends."""
        said, printed = io.StringIO(), io.StringIO()
        began, code, trace = time.process_time(), 0, ""
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed), _in_time(), _stdin("y\n"):
            try:
                main(words)
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                code, trace = 1, traceback.format_exc()
        log = logging.getLogger("align")
        log.handlers.clear()
        log.propagate = True
        return Outcome(code, said.getvalue(), trace, time.process_time() - began)


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    said: str
    """On stderr."""
    trace: str
    seconds: float

    @property
    def sentence(self) -> str:
        """What it was refused with."""
        return next((line for line in self.said.splitlines() if line.startswith("align: ")), "")


@dataclass(frozen=True)
class Hostile:
    """One thing of a stranger's."""

    kind: str
    """What it stands for in a command: a key of COMMANDS."""
    make: Callable[[World, Path], str | Path | None]
    """Writes it into a folder; returns what is named in its place."""
    said: str | None = None
    """What the sentence holds that it is refused with; None where it may also be read."""
    consent: str = ""
    """The option with which its code runs."""
    not_by: tuple[str, ...] = ()
    """Commands that do not look at what is wrong with it."""
    idle: tuple[str, ...] = ()
    """Commands that refuse it, although they would not run its code."""


Command = tuple[str, list[str]]
ROWS = "{rows}"
MODEL: list[Command] = [
    ("train", ["train", "{recipe}", "policy.model={x}", "output={out}"]),
    ("annotate", ["annotate", "{recipe}", "policy.model={x}", "output={out}"]),
    ("inspect", ["inspect", "{recipe}", "policy.model={x}"]),
    ("rollout", ["rollout", "{recipe}", "policy.model={x}", "output={out}"]),
    ("plan", ["doctor", "--plan", "{recipe}", "policy.model={x}"]),
    ("evaluate rows", ["evaluate", "rows", ROWS, "--model", "{x}"]),
    ("chat", ["chat", "{x}", "--prompt", "a b", "--max-tokens", "2"]),
    ("export", ["export", "{x}", "{out}"]),
]
SCORER: list[Command] = [
    ("score", ["score", ROWS, "{out}.jsonl", "--reward", "{x}", "--no-cache"]),
    ("evaluate rewards", ["evaluate", "rewards", ROWS, "--reward", "{x}"]),
    ("train with a reward", ["train", "{recipe}", "sampling.reward={x}", "output={out}"]),
]
ADAPTER: list[Command] = [
    ("evaluate rows", ["evaluate", "rows", ROWS, "--model", "{x}"]),
    ("chat", ["chat", "{x}", "--prompt", "a b", "--max-tokens", "2"]),
    ("export", ["export", "{x}", "{out}"]),
    ("export merged", ["export", "{x}", "{out}", "--merge"]),
]
RUN: list[Command] = [*ADAPTER, ("report", ["report", "{x}", "--output", "{out}.html"])]
RECIPE: list[Command] = [
    ("train", ["train", "{x}", "output={out}"]),
    ("annotate", ["annotate", "{x}", "output={out}"]),
    ("inspect", ["inspect", "{x}"]),
    ("rollout", ["rollout", "{x}", "output={out}"]),
    ("plan", ["doctor", "--plan", "{x}"]),
]
READERS: list[Command] = [
    ("train", ["train", "{recipe}", "data.sources=[{x}]", "output={out}"]),
    ("inspect", ["inspect", "{recipe}", "data.sources=[{x}]"]),
    ("evaluate rows", ["evaluate", "rows", "{x}", "--model", "{base}"]),
    ("evaluate rewards", ["evaluate", "rewards", "{x}", "--reward", "{{name: length, max: 3}}"]),
    ("score", ["score", "{x}", "{out}.jsonl", "--reward", "{{name: length, max: 3}}"]),
]
CHAT: list[Command] = [
    ("train", ["train", "{recipe}", "policy.model={x}", "data.sources=[{messages}]", "output={out}"]),
    ("inspect", ["inspect", "{recipe}", "policy.model={x}", "data.sources=[{messages}]"]),
    ("rollout", ["rollout", "{recipe}", "policy.model={x}", "data.sources=[{messages}]", "output={out}"]),
    ("evaluate rows", ["evaluate", "rows", "{messages}", "--model", "{x}"]),
    ("chat", ["chat", "{x}", "--prompt", "a b", "--max-tokens", "2"]),
    ("judge", ["score", "{messages}", "{out}.jsonl", "--reward", "{{name: judge, model: {x}}}"]),
    (
        "implicit",
        ["score", "{messages}", "{out}.jsonl", "--reward", "{{name: density_ratio, strong: {x}, weak: {base}}}"],
    ),
]
COMMANDS: dict[str, list[Command]] = {
    "model": MODEL,
    "scorer": SCORER,
    "adapter": ADAPTER,
    "run": RUN,
    "chat": CHAT,
    "rows": READERS,
    "recipe": RECIPE,
    "config": [("import", ["import", "{x}", "--to", "{out}.yaml", "--check"])],
}


def with_remote_code(base: Path, folder: Path, code: str, *, model_type: str, tokenizer: bool = False) -> None:
    """A copy of a model whose config or tokenizer names classes in a file beside it."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    file = folder / ("tokenizer_config.json" if tokenizer else "config.json")
    tree = json.loads(file.read_text()) | ({} if tokenizer else {"model_type": model_type})
    own = {"AutoTokenizer": [None, "theirs.Words"]} if tokenizer else {"AutoConfig": "theirs.Config"}
    models = {} if tokenizer else {name: "theirs.Model" for name in ("AutoModelForCausalLM", "AutoModel")}
    tree["auto_map"] = own | models
    if tokenizer:
        tree["tokenizer_class"] = "Words"
    file.write_text(json.dumps(tree))
    (folder / "theirs.py").write_text(
        code + "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class Words(PreTrainedTokenizerFast):\n    pass\n"
        f"class Config(LlamaConfig):\n    model_type = {model_type!r}\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )


def remote(model_type: str, *, tokenizer: bool = False) -> Callable[[World, Path], None]:
    def make(world: World, folder: Path) -> None:
        with_remote_code(world.base, folder, world.code(), model_type=model_type, tokenizer=tokenizer)

    return make


def adapter_on_remote(world: World, folder: Path) -> None:
    """An adapter whose base has code."""
    base = folder.with_name(folder.name + "_base")
    with_remote_code(world.base, base, world.code(), model_type="stranger")
    shutil.copytree(world.adapter, folder, dirs_exist_ok=True)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))


def seal_as_theirs(folder: Path) -> None:
    """Digests of what a stranger has made of a run: they tell damage, not who wrote it."""
    (folder / "digests.json").unlink()
    run = RunDirectory(folder)
    for checkpoint in numbered(run.checkpoints):
        seal(checkpoint, {"step": step_of(checkpoint), **run.identity()})


def run_on_remote(trust: bool) -> Callable[[World, Path], None]:
    """A run of a model that has code, whose recipe consents to it, or not."""

    def make(world: World, folder: Path) -> None:
        base = folder.with_name(folder.name + "_base")
        with_remote_code(world.base, base, world.code(), model_type="stranger")
        shutil.copytree(world.run, folder, dirs_exist_ok=True)
        tree = yaml.safe_load((folder / "recipe.yaml").read_text())
        tree["policy"] |= {"model": str(base), "trust_remote_code": trust}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
        seal_as_theirs(folder)
        weights = folder / "adapter/adapter_model.safetensors"
        save_file(load_file(weights), weights)  # which then says of no base that it is another
        file = folder / "adapter/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))

    return make


def recipe_that_trusts(world: World, folder: Path) -> Path:
    model = folder / f"{folder.name}_model"  # whose name transformers remembers the module by
    with_remote_code(world.base, model, world.code(), model_type="llama", tokenizer=True)
    policy = {"model": str(model), "trust_remote_code": True}
    return world.write_recipe(folder / "recipe.yaml", policy=policy)


def config_that_trusts(world: World, folder: Path) -> Path:
    """Another tool's configuration."""
    model = folder / f"{folder.name}_model"
    with_remote_code(world.base, model, world.code(), model_type="llama", tokenizer=True)
    tree = {"model_name_or_path": str(model), "dataset_name": str(world.rows), "trust_remote_code": True}
    (folder / "dpo.yaml").write_text(yaml.safe_dump(tree | {"beta": 0.1, "loss_type": "sigmoid"}))
    return folder / "dpo.yaml"


def _own_module(world: World, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    body = "def f(*arguments, **keywords):\n    return 0.0\n"
    (folder / "theirs.py").write_text(world.code(body))


def run_with_function(section: str) -> Callable[[World, Path], None]:
    """A run whose objective or score is a function of a file."""

    def make(world: World, folder: Path) -> None:
        shutil.copytree(world.run, folder, dirs_exist_ok=True)
        _own_module(world, folder)
        tree = yaml.safe_load((folder / "recipe.yaml").read_text())
        tree[section] = {"name": "python", "function": f"{folder / 'theirs.py'}:f"}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
        seal_as_theirs(folder)

    return make


def recipe_of_run(section: str) -> Callable[[World, Path], Path]:
    def make(world: World, folder: Path) -> Path:
        run_with_function(section)(world, folder)
        return folder / "recipe.yaml"

    return make


def open_to_all(path: Path) -> Path:
    """A file in a folder that everyone may write."""
    path.parent.chmod(0o777)
    return path


def recipe_with(**sections: object) -> Callable[[World, Path], Path]:
    """A recipe with these sections in a folder that everyone may write; `{here}` is that folder."""

    def make(world: World, folder: Path) -> Path:
        _own_module(world, folder)
        told = json.loads(json.dumps(sections).replace("{here}", str(folder)))
        return open_to_all(world.write_recipe(folder / "recipe.yaml", **told))

    return make


def spec(text: str, *, shared: bool = True) -> Callable[[World, Path], Path]:
    def make(world: World, folder: Path) -> Path:
        _own_module(world, folder)
        sys.path[:] = [place for place in sys.path if "stranger" not in place] + [str(folder)]
        sys.modules.pop("theirs", None)
        path = folder / "spec.yaml"
        path.write_text(text.replace("{marker}", str(world.marker)))
        return open_to_all(path) if shared else path

    return make


def model_with(*changes: Callable[[Path], None], of: str = "base") -> Callable[[World, Path], None]:
    """A copy of an honest folder, changed."""

    def make(world: World, folder: Path) -> None:
        shutil.copytree(getattr(world, of), folder, dirs_exist_ok=True)
        (folder / "digests.json").unlink(missing_ok=True)  # a stranger writes what he likes there
        for change in changes:
            change(folder)

    return make


def keys(file: str, **values: object) -> Callable[[Path], None]:
    """Keys of a JSON file laid over."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def content(file: str, text: str | bytes) -> Callable[[Path], None]:
    """A file with another content, or one that was not there."""

    def change(folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def without(*files: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def pickled(file: str, *others: str) -> Callable[[World, Path], None]:
    """Weights in a pickle alone, which would run code."""
    kind = "adapter" if "adapter" in file else "base"

    def make(world: World, folder: Path) -> None:
        model_with(without(*others), of=kind)(world, folder)
        with (folder / file).open("wb") as out:
            pickle.dump(_Running(world.marker), out)

    return make


class _Running:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def tensors(header: object, *, size: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with this header, which says that it has `size` bytes."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def run_with(*changes: Callable[[Path], None]) -> Callable[[World, Path], None]:
    return model_with(*changes, of="run")


def file_with(name: str, text: str | bytes) -> Callable[[World, Path], Path]:
    def make(world: World, folder: Path) -> Path:
        content(name, text)(folder)
        return folder / name

    return make


@cache
def unzipped(text: bytes, times: int) -> bytes:
    """Gzip data that becomes `times` of a text."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(packer.compress(text) for _ in range(times)), packer.flush()])


def bomb(name: str, text: bytes) -> Callable[[World, Path], Path]:
    """Three gigabytes of a text of a megabyte, packed when they are wanted: it takes seconds the first time."""

    def make(world: World, folder: Path) -> Path:
        return file_with(name, unzipped(text, 3000))(world, folder)

    return make


def table_bomb(world: World, folder: Path) -> Path:
    """A kilobyte of Parquet whose 3000 rows have one text of 20 MB, of a dictionary."""
    long = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 3000, pyarrow.int32()), pyarrow.array(["a" * 2 * 10**7])
    )
    table = pyarrow.table({"prompt": ["q"] * 3000, "chosen": long, "rejected": ["b"] * 3000})
    parquet.write_table(table, folder / "rows.parquet", compression="zstd", store_schema=False)
    return folder / "rows.parquet"


LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 30))
DEEP = "[" * 100_000 + "]" * 100_000
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HUGE = "{{ 'a' * 10**10 }}"
DOUBLE = "{% set n = namespace(x='aaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
OFFSETS = {
    "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
}
OWN = {"name": "python", "function": "{here}/theirs.py:f"}
NEEDS_CODE = "comes with Python code of its own, which is not run unasked; read it, then give --trust-remote-code"
NOT_CALLED = ("inspect", "chat", "export", "export merged", "report")
"""Commands that call no function of a recipe's."""
IDLE = ("annotate", "rollout")
LOOKS = ("inspect", "plan")
"""Commands that read no weight."""
COPIES = ("export",)
"""Which copies an adapter without its base."""
BY_NAME = "train with a reward"
"""Which takes a specification's file for a model's name."""
HOSTILE: dict[str, Hostile] = {
    "model of a class of its own": Hostile("model", remote("stranger"), NEEDS_CODE, TRUST, ("inspect",)),
    "model of a known class, with code": Hostile("model", remote("llama"), consent=TRUST),
    "tokenizer with code": Hostile("model", remote("llama", tokenizer=True), consent=TRUST),
    "scorer of a class of its own": Hostile("scorer", remote("stranger"), "which no scorer runs"),
    "scorer whose tokenizer has code": Hostile("scorer", remote("llama", tokenizer=True)),
    "adapter on a base with code": Hostile("adapter", adapter_on_remote, NEEDS_CODE, TRUST, ("export",)),
    "run that trusts": Hostile("run", run_on_remote(True), "is no consent", TRUST, ("report",), ("export",)),
    "run on a base with code": Hostile("run", run_on_remote(False), NEEDS_CODE, TRUST, ("report", "export")),
    "recipe that trusts": Hostile("recipe", recipe_that_trusts, "is no consent", TRUST),
    "configuration that trusts": Hostile("config", config_that_trusts, consent=TRUST),
    "run with an objective": Hostile("run", run_with_function("objective"), "is a run directory", ALLOW, NOT_CALLED),
    "run with a score": Hostile("run", run_with_function("score"), "is a run directory", ALLOW, NOT_CALLED),
    "recipe in a run": Hostile("recipe", recipe_of_run("objective"), "is a run directory", ALLOW, NOT_CALLED, IDLE),
    "recipe with an objective": Hostile("recipe", recipe_with(objective=OWN), "everyone", ALLOW, NOT_CALLED, IDLE),
    "recipe with two objectives": Hostile(
        "recipe", recipe_with(objective=[{"name": "sft"}, OWN]), r"objective\.1\.function: ", ALLOW, NOT_CALLED, IDLE
    ),
    "recipe with a score in an objective": Hostile(
        "recipe", recipe_with(objective={"name": "logistic", "score": OWN}), "everyone", ALLOW, NOT_CALLED, IDLE
    ),
    "recipe with a shell as reward": Hostile(
        "recipe",
        recipe_with(sampling={"reward": {"name": "python", "function": "os:popen"}}),
        "os:popen",
        "",
        NOT_CALLED,
    ),
    "recipe with vLLM's plug-ins": Hostile(
        "recipe",
        recipe_with(rollout={"engine": {"name": "vllm", "options": {"worker_cls": "theirs.Worker"}}}),
        "worker_cls: theirs.Worker",
        "",
        NOT_CALLED,
    ),
    "recipe with vLLM's consent": Hostile(
        "recipe", recipe_with(rollout={"engine": {"name": "vllm", "options": {"trust_remote_code": True}}}), "no option"
    ),
    "recipe with a kernel of the hub": Hostile(
        "recipe", recipe_with(policy={"attention": "stranger/kernel"}), "compiled code of the hub"
    ),
    "specification with a function": Hostile(
        "scorer", spec("{name: python, function: 'theirs:f'}"), "everyone", ALLOW, (BY_NAME,)
    ),
    "specification with transforms": Hostile(
        "scorer", spec("{scorer: {name: python, function: 'theirs:f'}, weight: 2}"), "", ALLOW, (BY_NAME,)
    ),
    "specification with a shell": Hostile(
        "scorer",
        spec("{name: python, function: 'os:popen'}", shared=False),
        "Python's own",
        "",
        (BY_NAME,),
    ),
    **{
        f"template that {what}": Hostile("chat", model_with(content("chat_template.jinja", text)), said)
        for what, text, said in (
            ("loops for ever", LOOP, "more than 1 s of computing"),
            ("makes ten gigabytes", HUGE, "more than 1 (GiB of memory|s of computing)"),  # what it meets first
            ("doubles", DOUBLE, "more than 1 (GiB of memory|s of computing)"),
            ("looks for Python", "{{ messages.__class__.__mro__[1].__subclasses__() }}", "is unsafe"),
            ("divides by zero", "{{ 1 / 0 }}", "division by zero"),
            ("calls itself", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without end"),
            ("is none", "{% if %}", "xpression"),
        )
    },
    **{
        f"weights in {file}": Hostile("model", pickled(file, "model.safetensors"), "pickle|safetensors", not_by=LOOKS)
        for file in ("pytorch_model.bin", "model.pt", "consolidated.pth", "pytorch_model-00001-of-00001.bin")
    },
    "adapter in adapter_model.bin": Hostile(
        "adapter", pickled("adapter_model.bin", "adapter_model.safetensors"), "safetensors"
    ),
    **{
        f"safetensors with {what}": Hostile("model", model_with(content("model.safetensors", data)), "", not_by=LOOKS)
        for what, data in (
            ("an absurd header", tensors({}, size=2**62)),
            ("overlapping places", tensors(OFFSETS, data=bytes(24))),
            ("no header", b"abc"),
            ("a deep header", struct.pack("<Q", len(DEEP)) + DEEP.encode()),
            ("tensors beyond its end", tensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
        )
    },
    **{
        f"config with {what}": Hostile("model", model_with(keys("config.json", **values)), said)
        for what, values, said in (
            ("ten million layers", {"num_hidden_layers": 10**7}, "num_hidden_layers"),
            ("10^12 words", {"vocab_size": 10**12}, "vocab_size"),
            ("a billion wide", {"hidden_size": 10**9}, "hidden_size"),
            ("10^12 positions", {"max_position_embeddings": 10**12}, "max_position_embeddings"),
            ("-1 layers", {"num_hidden_layers": -1}, ""),
            ("a number with 400 digits", {"intermediate_size": 10**400}, "intermediate_size"),
            ("texts for numbers", {"hidden_size": "16", "num_attention_heads": "2"}, ""),
            ("no heads", {"num_attention_heads": 0}, ""),
            ("another's kernel", {"attn_implementation": "stranger/kernel"}, "compiled code"),
            ("lists for names", {"architectures": [[1]], "model_type": ["llama"]}, ""),
            ("a million labels", {"id2label": {str(k): "a" for k in range(10)}, "num_labels": 10**9}, "num_labels"),
        )
    },
    **{
        f"{kind} with fewer layers than its weights": Hostile(
            kind, model_with(keys("config.json", num_hidden_layers=1), of=of), "its config makes 1 of", not_by=not_by
        )
        for kind, of, not_by in (("model", "base", LOOKS), ("scorer", "reward", ()))
    },
    "config that is deep": Hostile("model", model_with(content("config.json", DEEP)), ""),
    "config that is a list": Hostile("model", model_with(content("config.json", "[]")), ""),
    "tokenizer that is deep": Hostile("model", model_with(content("tokenizer.json", DEEP)), ""),
    "tokenizer that is a list": Hostile("model", model_with(content("tokenizer_config.json", "[]")), ""),
    **{
        f"adapter with {what}": Hostile(
            "adapter", model_with(keys("adapter_config.json", **values), of="adapter"), said, not_by=not_by
        )
        for what, values, said, not_by in (
            ("rank 10^9", {"r": 10**9}, "", COPIES),
            ("an unknown kind", {"peft_type": "STRANGER"}, "", ()),
            ("prompt tuning", {"peft_type": "PROMPT_TUNING"}, "", COPIES),
            ("no base", {"base_model_name_or_path": None}, "", ()),
            ("a list as base", {"base_model_name_or_path": ["a"]}, "base_model_name_or_path", ()),
            ("a slow pattern", {"target_modules": "(a+)+$" + "x"}, "", COPIES),
        )
    },
    "adapter config that is a list": Hostile(
        "adapter", model_with(content("adapter_config.json", "[]"), of="adapter"), ""
    ),
    "adapter config that is deep": Hostile(
        "adapter", model_with(content("adapter_config.json", DEEP), of="adapter"), ""
    ),
    **{
        f"recipe that {what}": Hostile("recipe", file_with("recipe.yaml", text), said)
        for what, text, said in (
            ("laughs", LAUGHS, "aliases"),
            ("holds itself", "policy: &a {model: *a}\n", ""),
            ("is deep", "policy: " + DEEP, "deep"),
            ("names a Python object", "policy: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
            ("is huge", "a: " + "b" * 20_000_000, "longer than"),
            ("has a number of a million digits", "seed: " + "1" * 1_000_000, ""),
            ("is binary", bytes(range(256)) * 10, ""),
        )
    },
    **{
        f"specification that {what}": Hostile("scorer", file_with("spec.yaml", text), said, not_by=(BY_NAME,))
        for what, text, said in (
            ("laughs", LAUGHS, "aliases"),
            ("holds itself", "name: &a [*a]\n", ""),
            ("is deep", DEEP, "deep"),
            ("names a Python object", "!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        )
    },
    **{
        f"configuration that {what}": Hostile("config", file_with("dpo.yaml", text), said)
        for what, text, said in (
            ("laughs", LAUGHS, "aliases"),
            ("is deep", DEEP, "deep"),
            ("holds itself", "a: &a [*a]", ""),
        )
    },
    "configuration of deep JSON": Hostile("config", file_with("dpo.json", DEEP), ""),
    "run whose recipe laughs": Hostile("run", run_with(content("recipe.yaml", LAUGHS)), "aliases"),
    "run whose recipe is deep": Hostile("run", run_with(content("recipe.yaml", DEEP)), "deep"),
    "run whose recipe is a list": Hostile("run", run_with(content("recipe.yaml", "[]")), ""),
    "run whose figures are deep": Hostile(
        "run", run_with(content("metrics.jsonl", DEEP + "\n"), content("summary.json", DEEP))
    ),
    "run whose figures are others": Hostile(
        "run", run_with(content("summary.json", "[1]"), content("environment.json", "3"))
    ),
    "run with a pickle as state": Hostile(
        "run", run_with(content("checkpoints/checkpoint-1/optimizer.pt", b"cos\nsystem\n"))
    ),
    "rows that are a zip bomb": Hostile("rows", bomb("rows.jsonl.gz", b"[" * 2**20), "longer than"),
    "rows of a table that is a bomb": Hostile("rows", table_bomb, "rows after row 0 take more than 1 GiB"),
    "rows in zstd": Hostile("rows", file_with("rows.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(20)), ""),
    **{
        f"rows in {kind}": Hostile("rows", file_with("rows.jsonl", data + bytes(20)), kind)
        for kind, data in (("xz", b"\xfd7zXZ"), ("zip", b"PK\x03\x04"), ("gzip", b"\x1f\x8b"))
    },
    "rows that are a bomb of JSON": Hostile("rows", bomb("rows.json.gz", b"[1]\n" * 2**18), "has no row a line"),
    "rows that are a bomb of cells": Hostile(
        "rows", bomb("rows.csv.gz", b"a" * 2**20), "unpacked|longer than|larger than"
    ),
    "rows in zstd under another name": Hostile("rows", file_with("rows.jsonl", b"\x28\xb5\x2f\xfd" + bytes(20)), ""),
    "rows of deep JSON": Hostile("rows", file_with("rows.jsonl", '{"prompt": ' + DEEP + "}\n"), ""),
    "rows with deep messages": Hostile(
        "rows", file_with("rows.jsonl", '{"prompt": "a", "chosen": ' + DEEP + "}\n"), ""
    ),
    "rows of a broken table": Hostile("rows", file_with("rows.parquet", b"PAR1" + b"x" * 100 + b"PAR1"), ""),
}


def pairs(*words: str) -> Iterator[tuple[str, str]]:
    """The names of every hostile thing and of every command that reads such a thing, those whose names hold a word."""
    for name, hostile in HOSTILE.items():
        for command, _ in COMMANDS[hostile.kind]:
            if all(word in f"{name} / {command}" for word in words):
                yield name, command


class Tried(NamedTuple):
    """How a command has met a hostile thing."""

    outcome: Outcome
    faults: list[str]
    """None, if all is well."""


def try_pair(world: World, name: str, command: str) -> Tried:
    """Let a command meet a hostile thing, and with the option that consents to it if it has code."""
    hostile = HOSTILE[name]
    number = sum(1 for _ in world.root.glob("stranger*"))
    folder = world.root / f"stranger{number}"
    folder.mkdir()
    (world.root / f"stranger{number}_").touch()
    named = hostile.make(world, folder) or folder
    filled = {
        "x": named,
        "rows": world.rows,
        "recipe": world.recipe,
        "base": world.base,
        "messages": world.messages,
        "out": world.root / f"out{number}",
    }
    template = dict(COMMANDS[hostile.kind])[command]
    world.marker.unlink(missing_ok=True)
    outcome = world.call([word.format(**filled) for word in template])
    faults = _faults(hostile, command, world, outcome)
    if not faults and hostile.consent and command not in (*hostile.not_by, *hostile.idle):
        filled["out"] = world.root / f"out{number}-consent"
        consented = world.call([*(word.format(**filled) for word in template), hostile.consent])
        if not world.marker.exists():
            faults.append(f"with {hostile.consent} its code does not run:\n{consented.said}")
    return Tried(outcome, faults)


def _faults(hostile: Hostile, command: str, world: World, outcome: Outcome) -> list[str]:
    found = []
    if world.marker.exists():
        found.append("its code has run")
    if outcome.trace or outcome.code not in (0, 2):
        found.append(f"exit {outcome.code}\n{outcome.trace or outcome.said}")
    elif outcome.code == 2 and (not outcome.sentence or "Traceback" in outcome.said):
        found.append(f"no sentence: {outcome.said}")
    elif hostile.said is not None and command not in hostile.not_by:
        if outcome.code == 0:
            found.append(f"it is read, and not refused: {outcome.said}")
        elif not re.search(hostile.said, outcome.sentence):
            found.append(f"another sentence: {outcome.sentence}")
    if outcome.seconds > SECONDS:
        found.append(f"{outcome.seconds:.0f} s")
    return found


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _stdin(text: str) -> Iterator[None]:
    """Whoever asks is told yes: an answer that is piped in is no consent."""
    before, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        yield
    finally:
        sys.stdin = before
