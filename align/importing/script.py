"""A Python script that calls TRL's trainers, with Unsloth or without: read by `ast`, never run.

What is read are the arguments of a few calls, as far as reading tells what they are worth. A value that only running
could tell stops, unless it is one of the objects that a trainer is given.
"""

import ast
from pathlib import Path
from typing import Any, NamedTuple

from align.bounds import parse_python
from align.errors import UserError
from align.importing.names import called
from align.importing.values import Unread, Values, plain

TRAINERS = {
    "DPOTrainer": "dpo",
    "KTOTrainer": "kto",
    "RewardTrainer": "reward",
    "ORPOTrainer": "orpo",
    "CPOTrainer": "cpo",
    "SFTTrainer": "sft",
    "GRPOTrainer": "grpo",
    "RLOOTrainer": "rloo",
    "PPOTrainer": "ppo",
    "OnlineDPOTrainer": "online_dpo",
    "GKDTrainer": "gkd",
    "PRMTrainer": "prm",
    "UnslothTrainer": "sft",
}
CONFIGS = {name.replace("Trainer", "Config"): method for name, method in TRAINERS.items()} | {"TrainingArguments": ""}
MODELS = ("from_pretrained",)
OBJECTS = frozenset(
    """
    model ref_model args tokenizer processing_class train_dataset eval_dataset peft_config data_collator callbacks
    optimizers compute_metrics preprocess_logits_for_metrics quantization_config config token device_map
    optimizer_cls_and_kwargs
    """.split()  # noqa: SIM905, a table
)
"""Arguments that are objects: followed to the call that made them, or left."""
PARSED = ("HfArgumentParser", "TrlParser", "ArgumentParser", "Namespace")
TRL_FILE = (
    "it takes its settings from the command line; give the YAML that it is run with, or a shell file of the command"
)


class Script(NamedTuple):
    """What a script says."""

    method: str
    values: dict[str, Any]
    tool: str
    notes: dict[str, str]
    """Key -> what else the script does with it."""


def read_script(file: Path) -> Script:
    """The settings of a script.

    Raises:
        UserError: it is no Python, calls no trainer or several, or computes a setting.
    """
    try:
        tree = parse_python(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        said = str(error) or "nested too deeply"
        raise UserError(f"{file}: not valid Python ({said}); save a notebook as a script first") from None
    return _Reader(tree, file).script()


class _Reader:
    def __init__(self, tree: ast.Module, file: Path) -> None:
        self.file = file
        self.calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        self.calls.sort(key=lambda node: (node.lineno, node.col_offset))
        self.values = Values(tree, file)
        self.functions: dict[str, list[ast.FunctionDef]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                self.functions.setdefault(node.name, []).append(node)
        self.notes: dict[str, str] = {}
        self.found: dict[str, Any] = {}

    def script(self) -> Script:
        trainers = [call for call in self.calls if called(call) in TRAINERS]
        if not trainers:
            raise UserError(f"{self.file}: calls none of TRL's trainers; it needs one of {', '.join(TRAINERS)}")
        if len({TRAINERS[called(call)] for call in trainers}) > 1 or len(trainers) > 1:
            names = ", ".join(called(call) for call in trainers)
            raise UserError(f"{self.file}: calls several trainers ({names}); keep the one that is imported")
        trainer = trainers[0]
        method = TRAINERS[called(trainer)]
        if method not in ("dpo", "kto", "reward", "orpo", "cpo"):
            return Script(method, {}, "TRL", {})
        unsloth = any(called(call) == "get_peft_model" for call in self.calls) and self._unsloth()
        self._config(trainer)
        self._model(trainer)
        self._adapter(trainer)
        self._rows(trainer, "train_dataset", "dataset_name")
        self._rows(trainer, "eval_dataset", "eval_dataset_name")
        if self.values.defaulted:
            said = ", ".join(f"--{name}" for name in sorted(self.values.defaulted))
            self.notes["task"] = f"the script's options at their defaults ({said})"
        return Script(method, self.found, "Unsloth" if unsloth else "TRL", self.notes)

    def _unsloth(self) -> bool:
        return any("Fast" in ast.unparse(call.func) for call in self.calls)

    def _config(self, trainer: ast.Call) -> None:
        args = self._argument(trainer, "args", place=None)
        config = self._call(args) if args is not None else None
        if config is None or called(config) not in CONFIGS:
            named = [call for call in self.calls if called(call) in CONFIGS]
            config = named[0] if config is None and len(named) == 1 else config if config in named else None
        if args is not None and config is None:
            problem = (
                TRL_FILE if any(called(call) in PARSED for call in self.calls) else "write its arguments in the call"
            )
            raise UserError(f"{self.file}: `args={ast.unparse(args)}` of {called(trainer)} is not made here; {problem}")
        self._take(config)
        for keyword in trainer.keywords:
            if keyword.arg and keyword.arg not in OBJECTS:
                self._put(keyword.arg, keyword.value)

    def _take(self, call: ast.Call | None, renamed: dict[str, str] | None = None) -> None:
        """The keywords of a call."""
        for keyword in call.keywords if call else ():
            if keyword.arg is None:
                self._unpacked(keyword.value, renamed or {})
            elif keyword.arg not in OBJECTS:
                self._put((renamed or {}).get(keyword.arg, keyword.arg), keyword.value)

    def _unpacked(self, node: ast.expr, renamed: dict[str, str]) -> None:
        value = self.values.of(node)
        if not isinstance(value, dict):
            raise UserError(
                f"{self.file}, line {node.lineno}: `**{ast.unparse(node)}` is not read; write the arguments out"
            )
        if unread := next((name for name, own in value.items() if isinstance(own, Unread)), None):
            raise UserError(f"{self.file}, line {node.lineno}: `{unread}` is only known when the script runs; write it")
        self.found |= {renamed.get(str(name), str(name)): own for name, own in value.items()}

    def _put(self, name: str, node: ast.expr) -> None:
        value = self.values.of(node)
        if isinstance(value, Unread):
            place = f"{self.file}, line {node.lineno}: `{name}={value.source}`"
            parsed = TRL_FILE if any(called(call) in PARSED for call in self.calls) else "write its value there"
            raise UserError(f"{place} is only known when the script runs; {parsed}")
        self.found[name] = value

    def _model(self, trainer: ast.Call) -> None:
        node = self._argument(trainer, "model", place=0)
        call = self._call(node) if node is not None else None
        while call is not None and called(call) == "get_peft_model":
            inner = call.args[0] if call.args else self._argument(call, "model", place=None)
            call = self._call(inner) if inner is not None else None
        if call is not None and ast.unparse(call.func) == "PeftModel.from_pretrained" and len(call.args) > 1:
            self._put("start_adapter", call.args[1])
            self.found["use_peft"] = True
            call = self._call(call.args[0])
        if call is None or called(call) not in MODELS or "Tokenizer" in ast.unparse(call.func):
            value = self.values.of(node) if node is not None else None
            if not isinstance(value, str):
                made = [one for one in self.calls if called(one) in MODELS and "Model" in ast.unparse(one.func)]
                call = made[0] if made else None
            else:
                self.found["model_name_or_path"] = value
        if call is None:
            return
        if call.args:
            self._put("model_name_or_path", call.args[0])
        renamed = {"pretrained_model_name_or_path": "model_name_or_path", "max_seq_length": "model_max_seq_length"}
        for keyword in call.keywords:
            if keyword.arg in ("quantization_config", "device_map", "token", "num_labels", "cache_dir"):
                self._quantised(keyword)
            elif keyword.arg not in OBJECTS and keyword.arg:
                value = self.values.of(keyword.value)
                self.found.setdefault(renamed.get(keyword.arg, keyword.arg), plain(value))

    def _quantised(self, keyword: ast.keyword) -> None:
        call = self._call(keyword.value) if keyword.arg == "quantization_config" else None
        if call is not None:
            self._take(call)

    def _adapter(self, trainer: ast.Call) -> None:
        """PEFT's configuration, or Unsloth's call that attaches an adapter."""
        named = [call for call in self.calls if called(call) in ("LoraConfig", "get_peft_model")]
        given = self._argument(trainer, "peft_config", place=None)
        if given is not None and self._call(given) is None and not named and ast.unparse(given) != "None":
            raise UserError(f"{self.file}: `peft_config={ast.unparse(given)}` is not made here; {TRL_FILE}")
        if named:
            self.found["use_peft"] = True
        for call in named:
            renamed = {"r": "lora_r", "target_modules": "lora_target_modules", "random_state": "adapter_random_state"}
            self._take(call, renamed)

    def _rows(self, trainer: ast.Call, argument: str, key: str) -> None:
        node = self._argument(trainer, argument, place=None)
        if node is None or ast.unparse(node) == "None":
            return
        found = self._loaded(node, [])
        if found is None:
            if argument == "eval_dataset":
                self.notes[key] = "the held-out rows are made in the script"
                return
            made = f"`{argument}={ast.unparse(node)}`"
            self.found[key] = f"{self.file.stem}_rows.jsonl"
            self.notes[key] = f"{made} is made in the script: save it there, with `.to_json({self.found[key]!r})`"
            return
        call, split, done = found
        self._dataset(call, split, key)
        if done:
            said = ", ".join(f".{name}()" for name in dict.fromkeys(done))
            self.notes[key] = (
                f"the script changes the rows ({said}), which is not run: save them as a file to train on them"
            )

    def _dataset(self, call: ast.Call, split: str | None, key: str) -> None:
        values = [self.values.of(arg) for arg in call.args]
        named = {str(keyword.arg): self.values.of(keyword.value) for keyword in call.keywords}
        path = values[0] if values else named.get("path")
        files = named.get("data_files")
        if isinstance(files, dict):
            files = files.get(split or "train") or files.get("train")
        split = str(named.get("split") or split or "train")
        if isinstance(files, list) and len(files) == 1:
            files = files[0]
        where = files if isinstance(files, str) else path
        if not isinstance(where, str):
            raise UserError(
                f"{self.file}, line {call.lineno}: `{ast.unparse(call)}` is not read; write the name of the rows"
            )
        name = named.get("name") or (values[1] if len(values) > 1 else None)
        prefix = "" if key == "dataset_name" else "eval_"
        self.found[key] = where
        self.found[f"{prefix}dataset_split"] = None if isinstance(files, str) else split.partition("[")[0]
        if "[" in split:
            self.notes[key] = f"the script takes `{split}`; all rows of the split are read here, see data.limit"
        if isinstance(name, str):
            self.found[f"{prefix}dataset_config"] = name

    def _loaded(
        self, node: ast.expr | None, done: list[str], depth: int = 0
    ) -> tuple[ast.Call, str | None, list[str]] | None:
        """The call of load_dataset that an expression begins with, the split taken and what is done to the rows."""
        split = None
        while node is not None and depth < 50:
            depth += 1
            if isinstance(node, ast.Name):
                node = self.values.names.get(node.id)
            elif isinstance(node, ast.Subscript):
                key = self.values.of(node.slice)
                split, node = key if isinstance(key, str) else split, node.value
            elif isinstance(node, ast.Call) and called(node) in ("load_dataset", "load_from_disk"):
                return node, split, done
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr not in ("shuffle", "to_list", "with_format"):
                    done.append(node.func.attr)
                node = node.func.value
            elif isinstance(node, ast.Call):
                inside = [self._loaded(arg, [*done, called(node)], depth) for arg in node.args]
                return next((one for one in inside if one), None)
            else:
                return None
        return None

    def _argument(self, call: ast.Call, name: str, place: int | None) -> ast.expr | None:
        named = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
        if named is None and place is not None and len(call.args) > place:
            return call.args[place]
        return named

    def _returned(self, call: ast.Call) -> ast.expr | None:
        """What a function of the script's own returns, where that is written once."""
        own = self.functions.get(call.func.id, []) if isinstance(call.func, ast.Name) else []
        values = [node.value for one in own for node in ast.walk(one) if isinstance(node, ast.Return) and node.value]
        return values[0] if len(own) == 1 and len(values) == 1 else None

    def _call(self, node: ast.expr | None) -> ast.Call | None:
        """The call that made an object."""
        for _ in range(20):
            if isinstance(node, ast.Call):
                if (returned := self._returned(node)) is None:
                    return node
                node = returned
                continue
            if isinstance(node, ast.Tuple) and node.elts:
                node = node.elts[0]
            elif isinstance(node, ast.Name):
                node = self.values.names.get(node.id)
            else:
                return None
        return None
