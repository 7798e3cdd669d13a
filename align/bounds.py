"""How much is read of what a stranger may have written: every bound is named, with what to do where it is too small."""

import ast
import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml

from align.errors import UserError

YAML_LENGTH = 1_000_000
YAML_NODES = 1_000_000
"""Values of a YAML file with its aliases written out."""
DEPTH = 100
"""Levels of lists and mappings within each other."""
DIGITS = 1000
"""Of a whole number in YAML or Python, in whatever base; Python writes none of more than 4300."""
JSON_BYTES = 200_000_000
"""Of one file beside weights; the largest tokenizers have 30 MB."""
LAYERS = 10_000
LABELS = 100_000
"""Outputs of a classifier, for each of which transformers makes a name."""
SIZE = 2**31 - 1
"""The largest whole number in a model's config."""
HEADER = 100_000_000
"""Bytes of a safetensors file's header, as the library itself has it."""
PACKED = 16
"""Numbers that quantised weights may hold in one."""
DEEPNESS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
COUNTS = dict.fromkeys(DEEPNESS, LAYERS) | {"num_labels": LABELS}
WIDTHS = ("hidden_size", "n_embd", "d_model", "intermediate_size", "vocab_size")
LONG = f"holds a whole number of more than {DIGITS:,} digits; mend it"
DEEP = f"is deeper than {DEPTH} levels of lists and mappings; that is no file of its kind"


class TooMuch(yaml.YAMLError):
    """A text is beyond a bound, which is named."""


class Loader(yaml.SafeLoader):
    """Plain YAML, with `1e-6` a number as in YAML 1.2; the library holds to 1.1, where that is a text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(text: str, loader: type[yaml.SafeLoader] = Loader) -> Any:
    """The value of a YAML text, if it is in bounds.

    Raises:
        yaml.YAMLError: it is no YAML, or
        TooMuch: it is longer, deeper or, with its aliases written out, larger than a file that somebody writes.
    """
    if len(text) > YAML_LENGTH:
        raise TooMuch(f"is longer than {YAML_LENGTH:,} characters; that is no file of its kind")
    reader = loader(text)
    try:
        node = reader.get_single_node()
        _written_out(node, {}, 0)
        return None if node is None else reader.construct_document(node)
    except RecursionError:
        raise TooMuch(DEEP) from None
    except ValueError as error:  # a number with thousands of digits
        raise TooMuch(f"holds a value that cannot be read ({error}); mend it") from None
    finally:
        reader.dispose()


def parse_python(text: str, mode: Literal["exec", "eval"] = "exec") -> Any:
    """The tree of Python that is read and never run.

    Raises:
        SyntaxError: it is none.
        ValueError, RecursionError, MemoryError: it holds what Python does not read, or a whole number out of bounds.
    """
    tree = ast.parse(text, mode=mode)
    values = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    if any(isinstance(value, int) and abs(value) >= 10**DIGITS for value in values):
        raise ValueError(LONG)
    return tree


def _written_out(node: yaml.Node | None, known: dict[int, int], depth: int) -> int:
    """How many values a node is, each alias counted as what it stands for."""
    if depth > DEPTH:
        raise TooMuch(DEEP)
    if not isinstance(node, yaml.CollectionNode):
        if node is not None and node.tag == "tag:yaml.org,2002:int" and len(node.value) > DIGITS:
            raise TooMuch(LONG)
        return 1
    if id(node) not in known:
        known[id(node)] = YAML_NODES + 1  # until it is counted: what it holds may be itself
        below = [own for pair in node.value for own in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_written_out(own, known, depth + 1) for own in below)
    if known[id(node)] > YAML_NODES:
        raise TooMuch(f"has aliases that make more than {YAML_NODES:,} values of it; write them out")
    return known[id(node)]


def check_folder(folder: Path) -> None:
    """Refuse a folder of a model, tokenizer or adapter with a JSON file that nobody's model has.

    Raises:
        UserError: names the file, the key and the bound.
    """
    for file in sorted(folder.glob("*.json")):
        if file.stat().st_size > JSON_BYTES:
            raise UserError(f"{file}: is larger than {JSON_BYTES:,} bytes; that is no file of a model")
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            _check_config(folder / name)


def _check_config(file: Path) -> None:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{file}: {DEEP}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: holds a {type(tree).__name__} and no keys; fetch it again")
    if not isinstance(tree.get("base_model_name_or_path") or "", str):
        raise UserError(f"{file}: `base_model_name_or_path` is no name of a model; fetch it again, or mend the key")
    if file.name == "config.json":
        longest = max((_longest(one) for one in sorted(file.parent.glob("*.safetensors"))), default=0)
        _check_sizes(tree, file, "", 0, longest * PACKED or SIZE)


def _longest(weights: Path) -> int:
    """The longest side of a safetensors file's tensors; 0 where its header cannot be read, which loading it says."""
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= HEADER else b""
    try:
        found = json.loads(header)
        return max(int(side) for name, own in found.items() if name != "__metadata__" for side in own["shape"])
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return 0


def _check_sizes(tree: Any, file: Path, path: str, depth: int, widest: int) -> None:
    """Refuse a size, at any depth, that no machine could build, or of which the weights beside it hold nothing.

    Args:
        widest: the most that a width or a vocabulary may be.
    """
    if depth > DEPTH:
        raise UserError(f"{file}: {DEEP}")
    if isinstance(tree, dict):
        for key, value in tree.items():
            _check_sizes(value, file, f"{path}.{key}".lstrip("."), depth + 1, widest)
            if "attn_implementation" in key and "/" in str(value):
                raise UserError(f"{file}: `{key}` names {value}, compiled code of the hub; remove the key")
    elif isinstance(tree, list):
        for value in tree:
            _check_sizes(value, file, path, depth + 1, widest)
    elif isinstance(tree, int) and not isinstance(tree, bool):
        _check_size(tree, file, path, widest)


def _check_size(size: int, file: Path, path: str, widest: int) -> None:
    key = path.split(".")[-1]
    if abs(size) > (most := COUNTS.get(key, SIZE)):
        raise UserError(f"{file}: `{path}` is beyond {most:,}, which no model has; fetch it again, or mend the key")
    if key in (*DEEPNESS, *WIDTHS) and "." not in path and size < 1:
        raise UserError(f"{file}: `{path}` is {size}, and a model has 1 or more; fetch it again, or mend the key")
    if key in WIDTHS and "." not in path and size > widest:
        raise UserError(f"{file}: `{path}` is {size:,}, and no tensor of the weights is near it; fetch both again")
