"""`hook_each RECIPE FOLDER` trains with hooks, and with a callback that ends it after step 3, in the processes started.

What a process is told goes to FOLDER/OUTPUT-RANK.jsonl; of several the last alone asks for the end.
"""

import json
import os
import sys
from pathlib import Path

from transformers import TrainerCallback

import align
from align.training.processes import leave


class AsksInOne(TrainerCallback):
    def on_step_end(self, args, state, control, **_) -> None:
        last = args.process_index == args.world_size - 1
        control.should_training_stop |= last and state.global_step == 3


def train(recipe: Path, folder: Path) -> None:
    """Train and write down what the hooks are told."""
    with (folder / f"{recipe.stem}-{os.environ.get('RANK', '0')}.jsonl").open("w", buffering=1) as file:

        def on_lists(seen: align.ListsSeen) -> None:
            lists = dict(zip(seen.ids, seen.losses.tolist(), strict=True))
            file.write(json.dumps({"step": seen.step, "lists": lists}) + "\n")

        def on_step(done: align.StepDone) -> None:
            file.write(json.dumps({"step": done.step, "loss": done.figures["loss"]}) + "\n")

        align.Trainer(recipe, on_lists=on_lists, on_step=on_step, callbacks=[AsksInOne()]).train()


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
