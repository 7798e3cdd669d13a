"""`align export`."""

from pathlib import Path
from typing import Any

from align.command import TRUST_REMOTE_CODE, Command, count, fraction, not_negative, option
from align.errors import UserError

TO = ("peft", "transformers", "gguf", "lora-gguf", "nf4", "fp8", "awq", "gptq", "onnx")
"""The rows of `align.export.formats.FORMATS`, which a test holds this to."""
DTYPES = ("float32", "bfloat16", "float16")
GGUF_TYPES = ("q8_0", "q6_k", "q5_0", "q5_1", "q5_k_s", "q5_k_m", "q4_0", "q4_1", "q4_k_s", "q4_k_m")


def check_places(given: dict[str, Any]) -> None:
    """Refuse what cannot be exported from or to, before torch is loaded.

    Raises:
        UserError: there is no such folder, or the output is taken.
    """
    path, output = Path(given["run_or_adapter"]), Path(given["output"])
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a run directory or an adapter's folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} exists and is not empty (an export is there whole or not at all); give another output folder or "
            "remove it"
        )


COMMANDS = (
    Command(
        "export",
        "what a run trained, for transformers, PEFT, vLLM, llama.cpp, Ollama or ONNX",
        "align.export.export:export",
        (
            option("run_or_adapter", metavar="RUN", help="a run directory, or an adapter's folder"),
            option("output", metavar="OUTPUT", help="a new or empty folder"),
            option("--to", choices=TO, help="what to write (default peft, and transformers where all weights trained)"),
            option("--merge", action="store_true", help="the same as --to transformers"),
            option(
                "--dtype",
                choices=(*DTYPES, *GGUF_TYPES),
                metavar="TYPE",
                help=f"what weights are stored in (default: as trained): {', '.join(DTYPES)}; "
                f"in a GGUF file also {', '.join(GGUF_TYPES)}",
            ),
            option(
                "--average",
                nargs="+",
                default=[],
                metavar="RUN",
                help="export the mean of RUN and these, which were trained on the same base",
            ),
            option(
                "--extrapolate",
                type=not_negative,
                default=0.0,
                metavar="SHARE",
                help="go further than training did by this share of its way (ExPO; try 0.1 to 0.5, and evaluate it)",
            ),
            option(
                "--drop",
                type=fraction,
                metavar="SHARE",
                help="let this share of the adapter's second factors be 0, the rest scaled up for it",
            ),
            option("--seed", type=count, default=0, help="of what is dropped (default 0)"),
            option("--lists", type=count, default=16, metavar="N", help="held-out lists to compare it on (default 16)"),
            option(
                "--engine",
                choices=("vllm",),
                help="have vLLM read it again, of --to peft and transformers (default: the library of that name)",
            ),
            option(
                "--tolerance",
                type=not_negative,
                metavar="NATS",
                help="by which log-probabilities may be off on average (default: by what weights are stored in)",
            ),
            TRUST_REMOTE_CODE,
            option("--push", metavar="HUB_NAME", help="upload the result to the hub as well"),
        ),
        before=check_places,
    ),
)
