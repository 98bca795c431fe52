"""What `mutmut run` found, module by module, and why each survivor lives.

    mutmut run && python tests/mutation.py --write docs/mutation.md

Exits with 1 where less than 90 % of a module's mutants are killed, or where a survivor has no
reason in `SURVIVORS`.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

#: Of each module's mutants, the share that must be killed.
LEAST = 0.9
INTRODUCTION = (
    "A mutant is the code with one small fault: a sign, a comparison, a number, an argument, a "
    "word of a message. It is killed if a test fails. Mutants of the modules below, each under the "
    "tests of these modules that reach it; a mutant that runs into the time limit counts as "
    "killed. Code outside of functions (tables, defaults of classes), properties and what is "
    "decorated is not mutated."
)
TITLES = "| module | mutants | killed | timeouts | survived | killed, of all |"
LINE = re.compile(r"\s*vispco\.(\w+)\.(\S+?)__mutmut_(\d+): (.+)")
#: {reason: {module: parts of the mutated lines}}
SURVIVORS = {
    "Equal: of a matrix, dimension 1 is the last": {
        "pareto": ["all(+1)", "any(+1)"],
        "relaxation": ["(+1", "=+1", "[+1]", "argsort(descending=True, stable=True)"],
        "ste": ["(+1", "=+1", "argsort(stable=True)"],
    },
    "Where a tensor is put: the tests need no accelerator, so all are on the CPU": {
        "pareto": [
            "device=None",
            "dtype=torch.bool, )",
            "dtype=torch.float64, )",
            "torch.tensor(flags, )",
            ".to(None)",
        ],
        "alm": ["device=None", "dtype=torch.float64, )", "_inequality.to(None)"],
        "kernels": ["device=None", "dtype=theta.dtype, )"],
        "ste": ["1e-6).to(None)", "generator=at.generator).to(None)", "- 1).to(None)"],
        "flops": ["device=None", "as_tensor(n_text, )", "as_tensor(n, )"],
    },
    "Equal: the next operation promotes to the same precision": {
        "relaxation": [".to(None)"],
        "kernels": [
            "dtype=None",
            "torch.arange(self.num_layers, device=theta.device)",
            "_positions().to(None)",
        ],
        "ste": [".to(None)"],
    },
    "Equal: nobody reads the value, or it is masked or overwritten before": {
        # Of no points.
        "pareto": ["objectives or (2"],
        # Any negative number stands for null.
        "alm": ["-2.0 if v is None"],
        "relaxation": ["masked_fill(~alive, 1)", "s, 2).log()", "high - low, 2)"],
        # Before first_layer, `schedule` puts 1.
        "kernels": ["value=None)", "(self.first_layer, 0), )", "value=2)"],
        "ste": [
            "masked_fill(~alive, 1)",
            "weight.where(alive, 2)",
            "_dither = None",
            "torch.zeros(1)",
            "n=2)",
            "get_close_matches(str(name), ESTIMATORS, )",
        ],
    },
    "Equal: at a tie both sides are the same, or the order is of no account": {
        "pareto": ["stable=False", "(thickness >= 0)", "(*cost.shape, 2)"],
        "alm": ["strict=", " good, )"],
        "ste": ["s >= least", "room < weight", "argsort(dim=-1, )", "stable=False"],
    },
    "The same distribution: the noise is symmetric, and any seed is as good": {
        "ste": ["detach() - noise * z", "detach() - reach", "_seed - 7919", "7920"]
    },
    "A number that was chosen: nothing is promised of its last digit": {
        "alm": [
            "inner: int = 101",
            "outer: int = 51",
            "history_size=21",
            "tolerance / 11",
            "1000001.0",
            "alpha: float = 3.0",
            '"strong_wolfe", tolerance_grad',
        ],
        "kernels": ["1000001.0", "> 0.005", "-8.0"],
        "ste": [
            "samples: int = 17",
            "clamp(max=2)",
            "clamp(None, 1 - 1e-6)",
            "clamp(1e-6, )",
            "clamp(1e-6, None)",
            "clamp(1e-6, 1 + 1e-6)",
            "clamp(1e-6, 2 - 1e-6)",
        ],
        # GFLOPs of four decimals.
        "flops": ["1000000001.0"],
    },
    "A safeguard for which the tests have no case: "
    "L-BFGS without its line search got through every problem tried": {
        "alm": ["line_search_fn=None", "max_iter=inner, history_size=20"]
    },
}


def mutmut(*words):
    """What a command of mutmut prints."""
    return subprocess.run(
        [sys.executable, "-m", "mutmut", *words], capture_output=True, text=True, check=True
    ).stdout


def mutated(name):
    """The lines of a mutant that differ from the code: (before, after), each in one line."""
    lines = [
        line for line in mutmut("show", name).splitlines() if not line.startswith(("---", "+++"))
    ]
    return tuple(
        " ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
    )


def reason(module, after):
    """Why a mutant survives; None if nobody has said so."""
    return next(
        (
            why
            for why, parts in SURVIVORS.items()
            if any(part in after for part in parts.get(module, ()))
        ),
        None,
    )


def page(counts, survivors):
    """The report as Markdown.

    counts: {module: Counter of outcomes}.
    survivors: {reason: [(module, function, after)]}.
    """
    rows = [
        f"| `{module}` | {sum(found.values())} | {found['killed']} | {found['timeout']} | "
        f"{sum(found.values()) - found['killed'] - found['timeout']} | {share(found):.1%} |"
        for module, found in sorted(counts.items())
    ]
    parts = [
        f"## {why} ({len(found)})\n\n"
        + "\n".join(f"- `{m}.{function}`: `{after}`" for m, function, after in found)
        for why, found in survivors.items()
    ]
    return (
        "\n\n".join(
            [
                "# Mutation testing",
                INTRODUCTION,
                "Made by `mutmut run`, then `python tests/mutation.py --write docs/mutation.md`, "
                f"with mutmut {version('mutmut')}, torch {version('torch')}, "
                f"hypothesis {version('hypothesis')}.",
                "\n".join([TITLES, "| --- | --- | --- | --- | --- | --- |", *rows]),
                "What survived, and why no test kills it, the mutated line as it then reads:",
                *parts,
            ]
        )
        + "\n"
    )


def share(found):
    """Of all mutants, those that a test noticed."""
    return (found["killed"] + found["timeout"]) / sum(found.values())


def main():
    """Read mutmut's results, judge them, and print or write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the report to this page")
    options = parser.parse_args()
    counts, survivors, faults = defaultdict(Counter), {why: [] for why in SURVIVORS}, []
    for line in mutmut("results", "--all", "true").splitlines():
        module, function, number, outcome = LINE.match(line).groups()
        counts[module][outcome] += 1
        if outcome not in ("killed", "timeout"):
            name = f"vispco.{module}.{function}__mutmut_{number}"
            before, after = mutated(name)
            function = function.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
            if why := reason(module, after):
                survivors[why].append((module, function, after))
            else:
                faults.append(f"{name} ({outcome}) is not explained:\n  - {before}\n  + {after}")
    faults += [
        f"{module}: {share(found):.1%} killed, less than {LEAST:.0%}"
        for module, found in counts.items()
        if share(found) < LEAST
    ]
    text = page(counts, survivors)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    else:
        print(text)
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
