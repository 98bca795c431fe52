"""What `mutmut run` found, module by module, and why each survivor lives.

    mutmut run && python tests/mutation.py --write docs/mutation.md

Exits with 1 where less than 90 % of a module's mutants are killed, or where a survivor has no reason in `SURVIVORS`.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

LEAST = 0.9  # of each module's mutants
LINE = re.compile(r"\s*vispco\.(\w+)\.(\S+?)__mutmut_(\d+): (.+)")
#: {reason: {module: parts of the mutated lines}}
SURVIVORS = {}


def mutmut(*words):
    """What a command of mutmut prints."""
    return subprocess.run([sys.executable, "-m", "mutmut", *words], capture_output=True, text=True, check=True).stdout


def mutated(name):
    """The lines of a mutant that differ from the code: (before, after), each in one line."""
    lines = [line for line in mutmut("show", name).splitlines() if not line.startswith(("---", "+++"))]
    return tuple(" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")


def reason(module, after):
    """Why a mutant survives; None if nobody has said so."""
    return next((why for why, parts in SURVIVORS.items() if any(part in after for part in parts.get(module, ()))), None)


def page(counts, survivors):
    """The report as Markdown. counts: {module: Counter of outcomes}; survivors: {reason: [(module, function, after)]}."""
    rows = [f"| `{module}` | {sum(found.values())} | {found['killed']} | {found['timeout']} | "
            f"{sum(found.values()) - found['killed'] - found['timeout']} | {share(found):.1%} |"
            for module, found in sorted(counts.items())]
    parts = [f"## {why} ({len(found)})\n\n" + "\n".join(f"- `{m}.{function}`: `{after}`" for m, function, after in found)
             for why, found in survivors.items()]
    return "\n\n".join([
        "# Mutation testing",
        "A mutant is the code with one small fault: a sign, a comparison, a number, an argument, a word of a message. It is "
        "killed if a test fails. Mutants of the modules below, each under the tests of these modules that reach it; a "
        "mutant that runs into the time limit counts as killed. Code outside of functions (tables, defaults of "
        "classes), properties and what is decorated is not mutated.",
        f"Made by `mutmut run`, then `python tests/mutation.py --write docs/mutation.md`, with mutmut {version('mutmut')}, "
        f"torch {version('torch')}, hypothesis {version('hypothesis')}.",
        "| module | mutants | killed | timeouts | survived | killed, of all |\n| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(rows),
        "What survived, and why no test kills it, the mutated line as it then reads:", *parts]) + "\n"


def share(found):
    """Of all mutants, those that a test noticed."""
    return (found["killed"] + found["timeout"]) / sum(found.values())


def main():
    """Read mutmut's results, judge them, and print or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    faults += [f"{module}: {share(found):.1%} killed, less than {LEAST:.0%}"
               for module, found in counts.items() if share(found) < LEAST]
    text = page(counts, survivors)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    else:
        print(text)
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
