"""The benchmark of exports: a kill costs one export, a refusal is a row, and a fault is tried again."""

import json
from pathlib import Path

import pytest

from align.bench import exports
from align.errors import UserError
from align.export.export import FIGURES


@pytest.fixture
def made(monkeypatch) -> list[tuple[str, str, str]]:
    """What was trained and exported, by adapter, format and dtype, in place of the work."""
    asked: list[tuple[str, str, str]] = []
    faults = iter([True])

    def train(recipe):
        asked.append((recipe.policy.adapter.name, "trained", ""))
        Path(recipe.output).mkdir()
        return type("Result", (), {"path": Path(recipe.output)})

    def export(run, output, *, to, dtype, lists, engine):
        asked.append(("", to, dtype))
        if to == "onnx":
            raise UserError(f"{run}: --to onnx: not this one")
        if to == "nf4" and next(faults, False):
            raise RuntimeError("a fault")
        Path(output).mkdir()
        (Path(output) / FIGURES).write_text(
            json.dumps(dict.fromkeys(exports.KEPT, 0.0) | {"engine": engine} | {"secret": 1})
        )

    monkeypatch.setattr(exports, "train", train)
    monkeypatch.setattr(exports, "export", export)
    monkeypatch.setattr(exports, "check_format", lambda form, dtype: None)
    return asked


def test_what_the_file_has_is_kept_and_a_fault_is_tried_again(made, tmp_path):
    file = tmp_path / "exports.json"
    exports.run(file, ["lora"], ["transformers", "nf4", "onnx"])
    rows = {(row["format"], row["dtype"]): row for row in json.loads(file.read_text())["exports"]}
    assert set(rows) == {("transformers", "float32"), ("transformers", "bfloat16"), ("nf4", "nf4"), ("onnx", "float32")}
    assert rows["nf4", "nf4"]["fault"] == "RuntimeError: a fault"
    assert rows["onnx", "float32"]["refused"] == "run: --to onnx: not this one"
    assert set(rows["transformers", "float32"]) == {"adapter", "format", "dtype", *exports.KEPT}
    made.clear()
    exports.run(file, ["lora", "dora"], ["nf4"])
    assert [one for one in made if one[1] != "trained"] == [("", "nf4", "nf4")] * 2
    assert [one[0] for one in made if one[1] == "trained"] == ["lora", "dora"]
    again = json.loads(file.read_text())["exports"]
    assert len(again) == 5 and not any("fault" in row for row in again)
    made.clear()
    exports.run(file, ["lora", "dora"], ["nf4"])
    assert made == []


def test_an_adapter_that_cannot_train_is_a_row_of_every_format(made, tmp_path, monkeypatch):
    def refuse(recipe):
        raise UserError("no such adapter here")

    monkeypatch.setattr(exports, "train", refuse)
    rows = exports.run(tmp_path / "exports.json", ["lofit"], ["peft", "awq"])["exports"]
    assert [row["refused"] for row in rows] == ["no such adapter here"] * 3


def test_eva_gets_rows_enough_to_settle_on_and_loftq_its_four_bits(made, tmp_path, monkeypatch):
    recipes = []

    def train(recipe):
        recipes.append(recipe)
        raise UserError("seen")

    monkeypatch.setattr(exports, "train", train)
    exports.run(tmp_path / "exports.json", ["lora", "eva", "loftq"], ["onnx"])
    assert [own.policy.quantization for own in recipes] == [None, None, "4bit"]
    limits = [own.data.limit for own in recipes]
    assert limits[0] == limits[2] < limits[1]


def test_the_engine_that_is_asked_for_reads_all(made, tmp_path):
    rows = exports.run(tmp_path / "exports.json", ["lora"], ["peft", "transformers"], engine="vllm")["exports"]
    assert [row["engine"] for row in rows] == ["vllm"] * 4
