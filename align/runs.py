"""Wiring: a recipe becomes objects, and they become a run."""

import json
import logging
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from align.data import Prepared, Source, prepare_data
from align.data.collate import Example
from align.data.steps import plan_steps
from align.evaluate.lists import evaluate_lists
from align.evaluate.samples import Samples, sample_heldout
from align.loss import ListLoss, build_loss
from align.model.forward import TokenScorer
from align.model.policy import Policy, load_policy, load_tokenizer
from align.model.reference import attach_reference
from align.progress import progress
from align.recipe import Recipe
from align.run_directory import RunDirectory, start_log, write_json
from align.summary import print_summary
from align.trainer import AlignTrainer, ProgressCallback

log = logging.getLogger("align")


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    path: Path
    summary: dict[str, Any]


def train(recipe: Recipe) -> RunResult:
    """Train the recipe's policy; a run that is already in `recipe.output` goes on where it stopped.

    Raises:
        UserError: the recipe, its data or its model cannot work, said before the first step.
    """
    run = RunDirectory(recipe.output)
    arguments = training_arguments(recipe, run)
    main = arguments.process_index == 0
    if main:
        run.open(recipe)
    start_log(run, main=main)
    if run.summary.exists():
        log.info("%s: already finished", run.path)
        return _finish(run, main)
    ...
