"""Fixtures and settings that every test shares."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import importlib.util
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from align.recipe import Recipe, parse_recipe

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
VOCABULARY = 40


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if "vllm" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: align doctor --install rollout-cpu"))


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    """Models of a few thousand parameters are fastest with one thread; a test's random numbers are its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _collections_pass_over_what_stays():
    """A run collects garbage as it starts, which looks at all objects of imported modules: a third of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _files_need_not_outlive_the_machine():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _messages_are_each_tests_own():
    """A run turns the logger to its folder for good; pytest then hears what propagates twice in the next test."""
    yield
    log = logging.getLogger("align")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)
    log.propagate = True


class Two:
    """`align ...` in two processes of this machine, through the command that a user would type."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-12000:]

    def finish(self) -> None:
        """Wait for its good end; on a busy machine it may take ten times as long as alone."""
        assert self.process.wait(timeout=1200) == 0, self.said()


@pytest.fixture
def start_each(tmp_path) -> Iterator[Callable[..., Two]]:
    """Starts processes of a module by accelerate's configuration file, and environment variables laid over.

    The port that accelerate is told is taken, so torch listens on one of the system's choice: one that is free when a
    test looks may be another process's some seconds later, when torch is loaded.
    """
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}  # --cpu itself starts one process only
    environment["PYTHONFAULTHANDLER"] = "1"  # a process that aborts says where
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests/training")))  # train_each
    with socket.create_server(("localhost", 0)) as taken:
        port = ["--main_process_port", str(taken.getsockname()[1])]

        def start(module: str, *arguments: str, processes: int = 2, config: str = "ddp", **over: str) -> Two:
            file = config if config.endswith(".yaml") else str(ROOT / f"recipes/accelerate/{config}.yaml")
            given = ["--config_file", file, "--num_processes", str(processes)]
            command = [sys.executable, "-m", "accelerate.commands.launch", *given, *port, "-m", module, *arguments]
            with (tmp_path / "launch.log").open("ab") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment | over, cwd=ROOT)
                return Two(process, tmp_path / "launch.log")

        yield start


@pytest.fixture
def start_two(start_each) -> Callable[..., Two]:
    """`align ...` in two processes."""
    return lambda *arguments: start_each("align.cli", *arguments)


@pytest.fixture
def shared_data() -> Path:
    """Public data sets and models that lie beside a developer's checkout; nothing of them is in the repository."""
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def save_tokenizer():
    """Writes a tokenizer of the words w3 ... w39 into a folder, with <s> and </s> or the special tokens given."""

    def save(folder: Path, *, size: int = VOCABULARY, **special: str) -> None:
        vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, size)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = special or {"bos_token": "<s>", "eos_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special).save_pretrained(folder)

    return save


@pytest.fixture(scope="session")
def save_llama(save_tokenizer):
    """Writes a two-layer Llama, with random weights large enough to matter, and its tokenizer into a folder."""

    def save(folder: Path, *, seed: int = 1, special: dict[str, str] | None = None, **settings) -> Path:
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        torch.manual_seed(seed)
        config = LlamaConfig(**sizes | heads | {"initializer_range": 0.3} | settings)
        LlamaForCausalLM(config).save_pretrained(folder)
        save_tokenizer(folder, size=config.vocab_size, **(special or {}))
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory, save_llama) -> Path:
    """The folder of a tiny Llama."""
    return save_llama(tmp_path_factory.mktemp("tiny_policy"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """Thirty lists of two to five completions of different lengths; more of the word w3 is better."""
    generator = torch.Generator().manual_seed(5)

    def words(length: int) -> list[str]:
        return [f"w{i}" for i in torch.randint(3, 9, (length,), generator=generator).tolist()]

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for row in range(30):
            completions = [words(int(n)) for n in torch.randint(1, 9, (2 + row % 4,), generator=generator)]
            grades = [float(c.count("w3")) + 0.1 * i for i, c in enumerate(completions)]
            line = {
                "id": str(row),
                "prompt": " ".join(words(3 + row % 5)) + f" w{10 + row}",
                "completions": [" " + " ".join(c) for c in completions],
                "grades": grades,
            }
            file.write(json.dumps(line) + "\n")
    return path


@pytest.fixture
def make_recipe(tiny_policy, rows_file, tmp_path):
    """A recipe of a few steps on the tiny policy; sections given are laid over it."""

    def make(output: str = "run", **sections) -> Recipe:
        tree = {
            "output": str(tmp_path / output),
            "policy": {"model": str(tiny_policy), "adapter": {"name": "lora", "rank": 4, "alpha": 8}},
            "reference": {"cache_dir": str(tmp_path / "cache")},
            "data": {"sources": [str(rows_file)], "eval_fraction": 0.2, "grades": "raw"},
            "objective": {"name": "lambda"},
            "train": {"lists_per_step": 6, "learning_rate": 1e-2, "threads": 1, "epochs": 2, "save_steps": 2},
            "sampling": {"prompts": 2, "max_tokens": 4},
        }
        for name, section in sections.items():
            tree[name] = tree[name] | section if isinstance(tree.get(name), dict) and name != "objective" else section
        return parse_recipe(tree, origin="test")

    return make


@pytest.fixture
def ragged() -> list[dict]:
    """Tokenised lists of one to eight completions, some of equal length."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 40, (length,), generator=generator).tolist()

    shapes = ((4, (5, 9)), (1, (3, 3, 1)), (7, (2, 6, 2, 2)), (3, (1, 4, 6, 2, 3, 4, 4, 1)), (2, (5,)))
    return [
        {"prompt_ids": [1, *ids(p - 1)], "completion_ids": [ids(n) for n in sizes], "grades": [float(n) for n in sizes]}
        for p, sizes in shapes
    ]


@pytest.fixture
def deep() -> list[dict]:
    """Tokenised lists whose completions share beginnings, and beginnings of those; two of them a system prompt too."""
    generator = torch.Generator().manual_seed(4)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 40, (length,), generator=generator).tolist()

    system, first, second = ids(20), ids(17), ids(18)
    resampled = [[*first, *ids(3)], [*first, *second, *ids(2)], ids(6), [*first, *second, *ids(4)], [*first, *ids(5)]]
    shapes = (([1, *ids(4)], resampled), ([*system, 5], [ids(3), ids(5)]), ([*system, 6], [ids(4), ids(4), first]))
    return [{"prompt_ids": p, "completion_ids": own, "grades": [float(len(c)) for c in own]} for p, own in shapes]
