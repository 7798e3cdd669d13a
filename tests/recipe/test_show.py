"""`align recipe`: what it prints loads, its schema holds for what loads and no more, and it says what the pages say."""

import html
import json
import re
from pathlib import Path

import pytest
import yaml

from align.cli import main
from align.errors import UserError
from align.recipe import load_recipe, parse_recipe, recipe_keys
from align.recipe.init import TASKS, init
from align.recipe.keys import explain_key
from align.recipe.recipe import dump_set

ROOT = Path(__file__).parents[2]
SMALL = {"output": "runs/x", "policy": {"model": "m"}, "data": {"sources": ["rows.jsonl"]}, "objective": "lambda"}
SILENT = {"title", "description", "default", "$schema", "$defs", "additionalProperties"}
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
TYPES |= {"integer": int, "number": (int, float)}


class Yaml12(yaml.SafeLoader):
    """As an editor reads it: `5e-7` is a number."""


Yaml12.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
Yaml12.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("0123456789"))


def has_type(value, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def of_type(name: str, check):
    """A word that says something of one type of value only."""
    return lambda value, said, fits: not has_type(value, name) or check(value, said, fits)


WORDS = {
    "type": lambda value, said, fits: has_type(value, said),
    "anyOf": lambda value, said, fits: any(fits(value, one) for one in said),
    "enum": lambda value, said, fits: value in said,
    "const": lambda value, said, fits: value == said,
    "required": of_type("object", lambda value, said, fits: set(said) <= value.keys()),
    "properties": of_type(
        "object", lambda value, said, fits: all(fits(value[key], one) for key, one in said.items() if key in value)
    ),
    "items": of_type("array", lambda value, said, fits: all(fits(one, said) for one in value)),
    "prefixItems": of_type(
        "array", lambda value, said, fits: all(fits(*one) for one in zip(value, said, strict=False))
    ),
    "minItems": of_type("array", lambda value, said, fits: len(value) >= said),
    "maxItems": of_type("array", lambda value, said, fits: len(value) <= said),
    "minLength": of_type("string", lambda value, said, fits: len(value) >= said),
    "minimum": of_type("number", lambda value, said, fits: value >= said),
    "maximum": of_type("number", lambda value, said, fits: value <= said),
    "exclusiveMinimum": of_type("number", lambda value, said, fits: value > said),
    "exclusiveMaximum": of_type("number", lambda value, said, fits: value < said),
}
"""Of JSON schema, what ours says; another word is a fault of the test."""


def holds(value, schema: dict, whole: dict) -> bool:
    def fits(value, schema) -> bool:
        return holds(value, schema, whole)

    if "$ref" in schema and not fits(value, whole["$defs"][schema["$ref"].rpartition("/")[2]]):
        return False
    others = schema.get("additionalProperties", True)
    if has_type(value, "object") and others is not True:
        rest = [own for key, own in value.items() if key not in schema.get("properties", {})]
        if rest and (others is False or not all(fits(own, others) for own in rest)):
            return False
    return all(WORDS[word](value, said, fits) for word, said in schema.items() if word not in SILENT | {"$ref"})


@pytest.fixture(scope="module")
def schema() -> dict:
    from align.recipe.written import written_schema

    return json.loads(json.dumps(written_schema()))


def fits(tree: dict, schema: dict) -> bool:
    return holds(tree, schema, schema)


def loads(tree: dict) -> bool:
    try:
        return bool(parse_recipe(tree, origin="test"))
    except UserError:
        return False


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_fits_the_schema(file, schema):
    assert fits(yaml.load(file.read_text(), Yaml12), schema)


@pytest.mark.parametrize("task", TASKS)
def test_a_tasks_recipe_is_what_init_writes_loads_and_fits(task, schema, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["recipe", task])
    text = capsys.readouterr().out
    assert text == init(task).read_text() and load_recipe(f"{task}.yaml")
    assert fits(yaml.load(text, Yaml12), schema)


WRITTEN = (
    {"objective": "logistic"},
    {"objective": ["logistic", {"name": "sft", "weight": 0.1}]},
    {"objective": {"name": "logistic", "score": "likelihood"}},
    {"objective": "logistc"},
    {"objective": {"log_base": 2}},
    {"objective": {"name": "logistic", "log_base": 2}},
    {"data": {"sources": "rows.jsonl"}},
    {"data": {"sources": {"path": "rows.jsonl", "weight": 2}}},
    {"data": {"sources": []}},
    {"data": {"sources": [3]}},
    {"data": {"sources": "a", "eval_sources": ["b", {"path": "c"}]}},
    {"policy": {"model": "m", "adapter": "full"}},
    {"policy": {"model": "m", "adapter": {"rank": 4}}},
    {"policy": {"model": "m", "adapter": {"rank": 0}}},
    {"policy": {"model": "m", "adapter": {"name": "rslora", "targets": ["q_proj"]}}},
    {"policy": {"model": "m", "adapter": {"name": "rslora", "targets": [1]}}},
    {"policy": {"model": "m", "adapter": {"feedforward": ["up_proj"]}}},
    {"policy": {}},
    {"score": "likelihood"},
    {"score": {"beta": 0.5}},
    {"score": {"beta": 0}},
    {"score": {"name": "log_ratio", "divergence": "js"}},
    {"score": {"name": "log_ratio", "divergence": {"name": "js"}}},
    {"sampling": {"reward": "my-model"}},
    {"sampling": {"reward": {"model": "my-model"}}},
    {"sampling": {"reward": {"name": "length", "max": 9}}},
    {"sampling": {"reward": {"name": "length", "max": "many"}}},
    {"rollout": {"engine": "transformers"}},
    {"rollout": {"engine": "transformer"}},
    {"train": {"report_to": "none"}},
    {"train": {"report_to": ["none"]}},
    {"train": {"learning_rate": -1}},
    {"train": {"tokens_per_batch": "auto"}},
    {"train": {"tokens_per_batch": "some"}},
    {"train": {"early_stopping": 3, "eval_steps": 5, "time_limit": "3h50m"}},
    {"train": {"early_stopping": "3", "eval_steps": 5}},
    {"train": {"lerning_rate": 1e-4}},
    {"regularizer": {"name": "token_reg", "alpha": 0.25}, "objective": "lambda"},
    {"token_weights": "tgdpo"},
    {"token_weights": {"name": "tgdpo"}},
    {"wpo": "clamped"},
    {"wpo": "other"},
    {"typo": 1},
    {"task": "dpo"},
)


@pytest.mark.parametrize("part", WRITTEN, ids=json.dumps)
def test_what_loads_fits_the_schema_and_what_does_not_does_not(part, schema):
    assert fits(SMALL | part, schema) == loads(SMALL | part)


def test_the_schema_is_printed(schema, capsys):
    main(["recipe", "--schema"])
    assert json.loads(capsys.readouterr().out) == schema
    assert schema["properties"]["train"] and schema["$schema"].startswith("https://json-schema.org/")


def rows_of_the_page() -> dict[tuple[str, str], list[str]]:
    """(place, key) -> cells of docs/recipe-keys.md, once for each section that stands there."""
    found: dict[tuple[str, str], list[str]] = {}
    place = choice = ""
    for line in (ROOT / "docs/recipe-keys.md").read_text().splitlines():
        if heading := re.match(r"#+ `([\w.]+)(?:: ([\w-]+))?`", line):
            place, choice = heading[1], heading[2] or ""
        elif row := re.match(r"\| `(\w+)` \| (.*) \| (.*) \| ?(.*) \|$", line):
            found[f"{place}.{choice}".strip("."), row[1]] = [*row.groups()[1:]]
    return found


def plain(text: str) -> str:
    """Without links, bold type and line breaks."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", html.unescape(text))
    for mark, words in (("**", ""), ("\\|", "|"), ("≥", ">="), ("≤", "<=")):
        text = text.replace(mark, words)
    return " ".join(text.split())


def test_a_key_is_explained_as_on_the_page():
    rows = rows_of_the_page()
    assert len(rows) > 200
    for (place, key), (kind, default, what) in rows.items():
        said = plain(explain_key(f"{place}.{key}".lstrip(".")))
        assert said.startswith(f"{place}.{key} ".lstrip("."))
        assert plain(default) in said and plain(what) in said, (place, key)
        if "](" not in kind:
            assert plain(kind) in said, (place, key)
        assert re.search(r"From \w+(, \w+)* in (align|rewards)/[\w/]+\.py", said)


@pytest.mark.parametrize("key", sorted(recipe_keys()))
def test_every_key_is_explained_by_its_dotted_name(key):
    words = explain_key(key).splitlines()
    assert len(words) >= 3 and words[0] == key.removesuffix(".name") or words[0] == key


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lerning_rate", "did you mean `train.learning_rate`?"),
        ("learning_rate", "`train.learning_rate`"),
        ("lists_per_stp", "`train.lists_per_step`"),
        ("per_device_train_batch_size", "`train.lists_per_step` here"),
        ("objective.logistic.bta", "objective"),
        ("policy.adapter.rnk", "`policy.adapter.rank`"),
        ("zzz", "such as `train`"),
    ],
)
def test_a_key_that_is_none_is_answered_with_the_nearest(key, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["recipe", "--explain", key])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"align: there is no key `{key}` in a recipe; ")
    assert meant in line


@pytest.mark.parametrize("command", ["train", "inspect", "annotate", "rollout"])
def test_help_says_where_the_keys_are(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    key = re.search(r"`align (recipe --explain [\w.]+)`", said)
    page = re.search(r"docs/[\w-]+\.md", said)
    main(key[1].split())
    assert (ROOT / page[0]).exists()


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda file: file.stem)
def test_what_a_recipe_sets_is_the_recipe_and_no_default(file):
    recipe = load_recipe(file)
    said = yaml.safe_load(dump_set(recipe))
    assert parse_recipe(said, origin="set") == recipe
    for section, keys in said.items():
        for key, value in keys.items() if isinstance(keys, dict) else ():
            default = getattr(type(recipe).model_fields[section].annotation, "model_fields", {}).get(key)
            assert default is None or default.is_required() or key == "name" or value != default.default
    assert said.keys() <= {"name"} | recipe.model_fields_set | {"task"}


def test_a_functions_own_options_are_among_what_is_set():
    given = SMALL | {"objective": {"name": "python", "function": "own.py:loss", "margin": 2.0}}
    recipe = parse_recipe(given, origin="test")
    assert parse_recipe(yaml.safe_load(dump_set(recipe)), origin="set") == recipe
