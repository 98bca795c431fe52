"""`vispco convert`: between published notations, serving engines and configuration files."""

from __future__ import annotations

import argparse

from .configs import HELP, PRESET, find_config
from .engines import ENGINES, flags_for
from .notations import NOTATIONS, parse_notation, write_notation
from .options import add_json, positive_int
from .output import check_file, print_json

SUMMARY = "turn published notations into configurations and back, or into flags of an engine"
EXAMPLES = (
    '--from fastv "K=2 R=0.5" --num-layers 32 -o config.json',
    '--from pdrop "layers=8,16,24 ratios=0.5,0.25,0.125" --num-layers 32 -o config.json',
    '--from sparsevlm "layers=2,6,15 tokens=300,200,110" --num-layers 32 -o config.json',
    "--config preset:fastv/k2-r50 --num-layers 28 -o config.json",
    "--config config.json --to fastv",
    "--config config.json --to vllm",
)


def add_options(sub: argparse.ArgumentParser) -> None:
    """Add the options of `vispco convert`."""
    add = sub.add_argument
    source = sub.add_mutually_exclusive_group(required=True).add_argument
    written = f"one of {', '.join(NOTATIONS)}, and what is written in it"
    source("--from", nargs=2, dest="source", metavar=("NOTATION", "TEXT"), help=written)
    source("--config", metavar="FILE", help=HELP)
    layers = "decoder layers of the model, with --from or a published configuration"
    add("--num-layers", type=positive_int, help=layers)
    visual = "visual tokens of a prompt (default: the configuration's own, else 576)"
    add("--n-visual", type=positive_int, help=visual)
    to = (
        "a notation to write (fastv, pdrop, sparsevlm), or a serving engine (vllm, sglang, "
        "openvino): its setting that comes closest, and what that cannot express (default: "
        "describe in words)"
    )
    add("--to", choices=[*NOTATIONS, *ENGINES], metavar="NAME", help=to)
    add("--output", "-o", metavar="FILE", help="write the configuration there")
    add_json(sub)


def run(options: argparse.Namespace) -> None:
    """Read, write, print."""
    if options.source and not options.num_layers:
        raise ValueError("--from needs --num-layers: how many decoder layers the model has")
    published = (options.config or "").startswith(PRESET)
    if published and not options.num_layers:
        raise ValueError(f"{options.config} needs --num-layers: the decoder layers of the model")
    if options.config and options.num_layers and not published:
        raise ValueError("--num-layers goes with --from: a configuration file knows its layers")
    if options.output:
        check_file(options.output)
    if options.source:
        notation, text = options.source
        config = parse_notation(notation, text, options.num_layers, options.n_visual or 576)
    else:
        config = find_config(options.config)(options.num_layers)
    to, cannot = options.to, None
    if to in ENGINES:
        text, cannot = flags_for(to, config)
    else:
        text = write_notation(to, config, options.n_visual) if to else config.describe()
    if options.output:
        config.save(options.output)
    if options.json:
        found = {"notation": to, "text": text, "config": config.to_dict()}
        print_json(found if cannot is None else {**found, "cannot": cannot})
    else:
        print(text if to or not options.output else f"{text}\n{options.output}")
        if cannot is not None:
            print("\nIt cannot express:", *cannot, sep="\n- ")
        if to in ENGINES and ENGINES[to].plugin:
            print(f"\n{ENGINES[to].plugin}")
