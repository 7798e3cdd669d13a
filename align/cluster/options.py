"""`--ray` and what goes with it, for every command whose rows may be worked on by other machines."""

import argparse
import re

from align.command import not_negative, option, positive

LOCAL = "local"
"""Ray's own word for a cluster that is started here and ends with the command."""
ADDRESS = re.compile(r"auto|local|[a-z]+://\S+|[^\s/=]+:\d+")


def address(text: str) -> str:
    """An address as Ray takes it; not the word that follows an `--ray` that was meant to have none."""
    if not ADDRESS.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text} is no address of a Ray cluster (auto, local, HOST:PORT, ray://HOST:PORT); for a local one let "
            "another option follow --ray, or let it stand last"
        )
    return text


RAY = (
    option(
        "--ray",
        nargs="?",
        const=LOCAL,
        type=address,
        metavar="ADDRESS",
        help="let the actors of this Ray cluster do the work; without ADDRESS one is started on this machine",
    ),
    option("--actors", type=positive, metavar="N", help="of the cluster; by default as many as its GPUs or cores hold"),
    option(
        "--gpus-per-actor",
        dest="gpus",
        type=not_negative,
        metavar="G",
        help="by default what one model needs, where the cluster has any",
    ),
)
