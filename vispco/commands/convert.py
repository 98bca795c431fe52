"""`vispco convert`: between published notations and configuration files."""

from __future__ import annotations

import argparse

from ..config import PruningConfig
from .notations import NOTATIONS, parse_notation, write_notation
from .options import add_json, whole
from .output import check_file, print_json

SUMMARY = "turn FastV's, PDrop's or SparseVLM's notation into a configuration, and back"
EXAMPLES = ('--from fastv "K=2 R=0.5" --num-layers 32 -o config.json',
            '--from pdrop "layers=8,16,24 ratios=0.5,0.25,0.125" --num-layers 32 -o config.json',
            '--from sparsevlm "layers=2,6,15 tokens=300,200,110" --num-layers 32 -o config.json',
            "--config config.json --to fastv")


def add_options(sub: argparse.ArgumentParser) -> None:
    """Of `vispco convert`."""
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--from", nargs=2, dest="source", metavar=("NOTATION", "TEXT"),
                        help=f"one of {', '.join(NOTATIONS)}, and what is written in it")
    source.add_argument("--config", metavar="FILE", help="a pruning configuration")
    sub.add_argument("--num-layers", type=whole(1), metavar="N", help="decoder layers of the model, with --from")
    sub.add_argument("--n-visual", type=whole(1), metavar="N", help="visual tokens of a prompt, for sparsevlm (default: "
                     "the configuration's own, else 576)")
    sub.add_argument("--to", choices=NOTATIONS, metavar="NOTATION", help="one of %(choices)s; default: describe in words")
    sub.add_argument("--output", "-o", metavar="FILE", help="write the configuration there")
    add_json(sub)


def run(options: argparse.Namespace) -> None:
    """Read, write, say."""
    if options.source and not options.num_layers:
        raise ValueError("--from needs --num-layers: how many decoder layers the model has")
    if options.config and options.num_layers:
        raise ValueError("--num-layers goes with --from: a configuration file knows its layers")
    if options.output:
        check_file(options.output)
    if options.source:
        notation, text = options.source
        config = parse_notation(notation, text, options.num_layers, options.n_visual or 576)
    else:
        config = PruningConfig.load(options.config)
    text = write_notation(options.to, config, options.n_visual) if options.to else config.describe()
    if options.output:
        config.save(options.output)
    if options.json:
        return print_json({"notation": options.to, "text": text, "config": config.to_dict()})
    print(text if options.to or not options.output else f"{text}\n{options.output}")
