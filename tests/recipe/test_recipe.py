"""Recipes: every shipped one loads, overrides land where they should, and mistakes are named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers.training_args import OptimizerNames

from align.errors import UserError
from align.recipe import dump_recipe, load_recipe, parse_recipe
from align.recipe.optimizers import OPTIMIZERS

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TREG = {"name": "token_reg"}
ADALORA = {"name": "adalora"}
SMALL = {
    "output": "runs/x",
    "policy": {"model": "m"},
    "data": {"sources": ["rows.jsonl"]},
    "objective": {"name": "lambda"},
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_reads_back_the_same(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "copy.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "copy.yaml") == recipe


def test_overrides_are_yaml_at_dotted_keys():
    overrides = [
        "train.learning_rate=1e-3",
        "data.sources.0.path=mine.jsonl",
        "objective={name: logistic, margin: 0.5}",
        "policy.adapter.rank=4",
        "train.steps=7",
    ]
    recipe = load_recipe(RECIPES[0].parent / "lipo_lambda.yaml", overrides)
    assert recipe.train.learning_rate == 1e-3
    assert recipe.data.sources[0].path == "mine.jsonl"
    assert recipe.objective[0].name == "logistic" and recipe.objective[0].margin == 0.5
    assert recipe.policy.adapter.rank == 4
    assert recipe.train.steps == 7


def test_a_single_objective_and_a_bare_path_are_lists_of_one():
    recipe = parse_recipe(SMALL, origin="here")
    assert [term.name for term in recipe.objective] == ["lambda"]
    assert recipe.data.sources[0].path == "rows.jsonl"


def test_a_choice_is_its_name_alone_or_the_default_ones_keys(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"score": "log_ratio_mean", "objective": ["lambda", "sft"]}))
    recipe = load_recipe(path, ["policy.adapter.rank=4", "rollout.engine.cache_gib=2"])
    assert recipe.score.name == "log_ratio_mean" and [term.name for term in recipe.objective] == ["lambda", "sft"]
    assert (recipe.policy.adapter.name, recipe.policy.adapter.rank) == ("lora", 4)
    assert (recipe.rollout.engine.name, recipe.rollout.engine.cache_gib) == ("vllm", 2)
    assert (
        load_recipe(path, ["score={beta: 0.2}"]).score
        == parse_recipe(SMALL | {"score": {"name": "log_ratio", "beta": 0.2}}, origin="here").score
    )
    assert load_recipe(path, ["rollout.engine=transformers"]).rollout.engine.name == "transformers"


def test_a_key_that_stands_twice_is_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL) + "train: {epochs: 1}\ntrain: {epochs: 2}\n")
    with pytest.raises(UserError, match="not valid YAML: .*`train` is there twice"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, "unknown key `trian`; did you mean `train`?"),
        ({"train": {"lerning_rate": 1}}, "unknown key `train.lerning_rate`; did you mean `train.learning_rate`?"),
        ({"learning_rate": 1}, "unknown key `learning_rate`; did you mean `train.learning_rate`?"),
        ({"score": {"name": "log_ratio", "bta": 1}}, "unknown key `score.log_ratio.bta`; did you mean `score.beta`?"),
        ({"train": {"learning_rate": -1}}, "`train.learning_rate`: input should be greater than 0, got -1"),
        ({"objective": {"name": "lamda"}}, "there is no objective `lamda`"),
        ({"objective": {"name": "aot"}}, "it sorts across the batch"),
        ({"objective": {"name": "sigmoid"}}, "TRL's `sigmoid` is {objective: {name: logistic}} here"),
        ({"objective": ()}, "objective: missing; for example `objective: {name: lambda}`"),
        ({"task": "sft"}, "`task: sft` has its own loss"),
        ({"train": {"keep_best": "ndcg"}}, "train.keep_best needs train.eval_steps"),
        ({"sampling": {"reward": {"name": "answer"}}}, "`sampling.reward`: needs a reference answer"),
        ({"data": {"sources": []}}, "`data.sources`: tuple should have at least 1 item"),
        ({"policy": {}}, "`policy.model` is missing"),
        (
            {"regularizer": {"name": "token_reg", "alfa": 1}},
            "unknown key `regularizer.alfa`; did you mean `regularizer.alpha`",
        ),
        ({"regularizer": {"name": "token_reg", "alpha": -1}}, "should be greater than or equal to 0, got -1"),
        ({"regularizer": TREG, "objective": {"name": "kto"}}, "token_reg weighs pairs of completions; put `logistic`"),
        ({"regularizer": TREG, "score": {"name": "length_desensitised"}}, "token_reg is defined for `log_ratio`"),
        ({"regularizer": TREG, "score": {"name": "log_ratio", "divergence": {"name": "js"}}}, "without a divergence"),
        ({"task": "sft", "objective": (), "token_weights": {"name": "column"}}, "sft takes no `regularizer`"),
        ({"token_rewards": {"name": "contrast", "better": "good"}}, "a template needs a `{prompt}`"),
        ({"data": {"sources": "rows.jsonl", "ches": {}}}, "give `keep_fraction` or `threshold`, one of the two"),
        ({"data": {"sources": "r.jsonl", "ches": {"keep_fraction": 0.5, "threshold": 1}}}, "one of the two"),
        (
            {"data": {"sources": "r.jsonl", "ches": {"threshold": 1}}, "policy": {"model": "m", "adapter": ADALORA}},
            "adalora must know the number of steps before `data.ches` chooses the lists; set train.steps",
        ),
        ({"train": {"optimizer": "adafactr"}}, "no optimizer `adafactr`; did you mean `adafactor`?"),
        ({"train": 3}, "`train`: give a section of keys, not 3"),
        ({"objective": {"weight": 2}}, "my.yaml: `objective.0.name` is missing"),
        ({"score": {"name": "log_rato"}}, "`score.name`: there is no name `log_rato`; did you mean `log_ratio`?"),
        ({"token_rewards": {"name": "x"}}, "`token_rewards.name`: there is no name `x`; take contrast, log_ratio"),
        ({"objective": {"name": "bradley_tery"}}, "there is no objective `bradley_tery`; did you mean `bradley_terry`"),
        ({"rollout": {"stop": "end"}}, "`rollout.stop`: give a list such as `[end]`, not 'end'"),
        (
            {"policy": {"model": "m", "adapter": {"name": "lora", "targets": "q_proj"}}},
            "input should be 'all-linear', got 'q_proj'; `policy.adapter.lora.targets`: give a list such as `[q_proj]`",
        ),
        (
            {"rollout": {"engine": {"name": "vllm", "cache": 1}}},
            "unknown key `rollout.engine.vllm.cache`; did you mean `rollout.engine.cache_gib`?",
        ),
        ({"train": {"report_to": ["tensorboards"]}}, "`train.report_to`: transformers has no tracker `tensorboards`"),
    ],
)
def test_a_mistake_is_named_with_its_key_and_a_remedy(change, message):
    with pytest.raises(UserError) as caught:
        parse_recipe(SMALL | change, origin="my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- 1", "a recipe is a mapping of sections")],
)
def test_a_broken_file_is_named(text, message, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_recipe(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="r.yaml: not valid YAML: 'utf-8' codec can't decode byte 0xff"):
        load_recipe(path)
    with pytest.raises(UserError, match="cannot read the recipe"):
        load_recipe(tmp_path / "absent.yaml")


def test_faulty_sources_are_named_once():
    with pytest.raises(UserError) as caught:
        parse_recipe(SMALL | {"data": {"sources": [{"path": 3}]}}, origin="r")
    assert str(caught.value) == "r: `data.sources.0.path`: input should be a valid string, got 3"


@pytest.mark.parametrize("override", ["train.seed", "train.seed=[1", "=1", "output.x=1", "data.sources.5=x"])
def test_an_override_that_fits_nowhere_is_named(override, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(UserError, match=override.split("=")[0] or "key=value"):
        load_recipe(path, [override])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (r'data.sources.0.path="\ud83d.jsonl"', "data.sources.0.path"),
        (r'policy={"model": "\ud83d"}', "policy.model"),
        (r'train={"\ud83d": 1}', "train (a key)"),
    ],
)
def test_half_a_character_in_a_recipe_is_named_by_its_key(override, key, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"data": {"sources": [{"path": "rows.jsonl"}]}}))
    with pytest.raises(UserError) as caught:
        load_recipe(path, [override])
    assert str(caught.value) == f"{path}: `{key}` holds half a character (a lone surrogate); mend the text"


HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "tokenizers", "trl", "numpy", "rich")
"""Together they take seconds to import."""


def in_a_fresh_interpreter(*arguments: str, heavy: tuple[str, ...] = HEAVY) -> tuple[int, str, list[str]]:
    """Exit code and standard error of `align ARGUMENTS`, and which heavy packages it imported."""
    program = (
        "import json, sys\n"
        "from align.cli import main\n"
        "try:\n    main(json.loads(sys.argv[1]))\n"
        "except SystemExit as end:\n    code = end.code\n"
        f"print(json.dumps([code, [name for name in {heavy} if name in sys.modules]]))"
    )
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RECIPES[0].parents[1])
    code, imported = json.loads(done.stdout.splitlines()[-1])
    return code, done.stderr, imported


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "recipes/dpo.yaml", "typo=1"], 2, "unknown key `typo`"),
        (["train", "recipes/dpo.yaml", "objective=hnge"], 2, "did you mean `hinge`?"),
        (["train", "recipes/dpo.yaml", "train.optimizer=adamm"], 2, "no optimizer `adamm`"),
        (["train", "recipes/reward_story.yaml", "objective=kto"], 2, "about a policy's log-probabilities"),
        (["rollout", "recipes/dpo.yaml", "rollout.reward={name: lenth}"], 2, "lenth"),
        (["annotate", "nowhere.yaml"], 2, "nowhere.yaml: cannot read the recipe"),
        (["--help"], 0, ""),
        (["train", "--help"], 0, ""),
    ],
)
def test_a_mistake_is_answered_before_anything_heavy_is_imported(arguments, code, message):
    ended, error, imported = in_a_fresh_interpreter(*arguments)
    assert (ended, imported) == (code, []) and message in error and "Traceback" not in error


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_needs_no_recipe(arguments):
    assert in_a_fresh_interpreter(*arguments, heavy=(*HEAVY, "pydantic")) == (0, "", [])


def test_the_optimizers_are_those_of_transformers():
    assert set(OPTIMIZERS) == {name.value for name in OptimizerNames}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_other_sources_leave_out_what_a_recipe_sets_for_its_own_rows(path, tmp_path, caplog):
    shipped = load_recipe(path)
    assert not caplog.records, "nothing is replaced"
    sources = ["a.jsonl", "b.jsonl"] if len(shipped.data.sources) > 1 else "mine.jsonl"
    mine = load_recipe(path, [f"data.sources={sources}"])
    assert mine.data.eval_sources == () and mine.data.append_eos is None, "defaults, of no one's data"
    tree = str({name: getattr(mine, name) for name in ("data", "sampling", "token_rewards")})
    assert "story" not in tree and "happy" not in tree, "the recipe's own rows, scorer or contexts"
    assert mine.data.eval_fraction > 0 and mine.sampling.prompts > 0, "what shows whether it learns anything"
    changed = {
        "data.append_eos": shipped.data.append_eos is not None,
        "sampling.reward": shipped.sampling.reward is not None,
        "data.eval_fraction": shipped.data.eval_fraction == 0,
        "sampling.prompts": shipped.sampling.prompts == 0,
    }
    said = {key: f"{key}," in caplog.text or f"{key};" in caplog.text for key in changed}
    assert said == changed and len(caplog.records) == (any(changed.values()) or shipped.data.eval_sources != ())
    same: dict = {"data": {"sources", "eval_sources", "append_eos"}, "sampling": {"reward"}, "token_rewards": True}
    for section, key in (key.split(".") for key, own in changed.items() if own):
        same[section].add(key)
    assert mine.model_dump(exclude=same) == shipped.model_dump(exclude=same), "and all else is as the recipe says"


def test_what_the_command_line_gives_with_the_sources_stays(caplog):
    path = RECIPES[0].parent / "lipo_lambda.yaml"
    given = ["data.eval_sources=[held.jsonl]", "data.append_eos=false", "sampling.reward={name: length, max: 9}"]
    mine = load_recipe(path, ["data.sources.0.path=mine.jsonl", *given])
    assert mine.data.eval_sources[0].path == "held.jsonl" and mine.data.append_eos is False
    assert mine.sampling.reward.name == "length" and not caplog.records
    assert load_recipe(path, ["data.sources.0.weight=2", "data.limit=5"]).data.eval_sources, "the rows are the same"
    assert load_recipe(path, ["data.sources=data/story-lists/train.jsonl.gz"]).data.append_eos is False
    assert load_recipe(path, ["data.sources=m.jsonl", "sampling={prompts: 3}"]).sampling.prompts == 3
