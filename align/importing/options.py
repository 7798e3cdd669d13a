"""`align import`."""

from align.command import TRUST_REMOTE_CODE, Command, option

METHODS = ("dpo", "kto", "reward", "orpo", "cpo", "simpo")
"""Of TRL's trainers."""

COMMANDS = (
    Command(
        "import",
        "write a recipe from a configuration or script of LLaMA-Factory, axolotl, TRL, ms-swift or Unsloth",
        "align.importing.run:import_file",
        (
            option("file", metavar="FILE", help="YAML, JSON, a shell script, or a Python script that is read, not run"),
            option("--to", metavar="RECIPE.yaml", help="where the recipe goes; without, it is printed"),
            option("--check", action="store_true", help="compare the token ids of the first 64 rows with the tool's"),
            TRUST_REMOTE_CODE,
            option("--method", choices=METHODS, help="of a TRL configuration that does not say it"),
        ),
        light=True,
    ),
)
