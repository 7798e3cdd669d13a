"""Folders that scorers cannot be read from as they are."""

import json

import pytest
from tiny_models import bert, llama, saved
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rewards import ScorerError, load_scorer

FOLDERS = {
    "sequence_classifier": (lambda: LlamaForSequenceClassification(llama(pad_token_id=0)), "model.layers"),
    "judge": (lambda: LlamaForCausalLM(llama()), "model.layers"),
    "relevance": (bert, "encoder.layer"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_layers_that_a_config_does_not_count_are_not_left_out(tmp_path, name):
    """transformers would read the first layers alone."""
    make, place = FOLDERS[name]
    spec = {"name": name, "model": saved(tmp_path, make())}
    load_scorer(spec)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ScorerError, match=rf"its config makes 1 of `{place}`, and its files hold weights of more"):
        load_scorer(spec)


def test_a_name_that_no_folder_can_have_is_refused_as_a_hub_name():
    with pytest.raises(ScorerError, match="not a folder here, and the hub gives no model of that name"):
        load_scorer({"name": "judge", "model": 300 * "a"})
