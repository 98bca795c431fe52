"""A process that has imported everything, and runs each search that it is asked for in a fork.

The fork dies as asked. A request is a line of JSON:
    {"run": what, "folder": where, "end": null or [how, when], "words": the last of the command}
The answer:
    {"code": the exit code, or minus the signal, "out", "err", "seconds", "cpu"}
How a fork ends:
    "seconds": SIGKILL, `when` seconds later.
    "before", "after", "torn": SIGKILL at the `when`-th line that the journal gets: before it is
        written, after it, or in the middle.
    "interrupt": Ctrl-C before the `when`-th line.
    "replace": SIGKILL at the `when`-th file that is about to get its name.
    "full": files may have `when` bytes.
"""

import contextlib
import json
import os
import resource
import shlex
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)

import vispco  # noqa: E402
from tests.reproduction import estimator_zoo  # noqa: E402, F401
from tests.reproduction.cache import Cache  # noqa: E402
from tests.reproduction.training.build import build_processor  # noqa: E402
from tiny import batch, tiny_llava  # noqa: E402
from vispco import alm, testbed  # noqa: E402
from vispco.commands import main as cli  # noqa: E402
from vispco.testbed.model import build_config  # noqa: E402
from vispco.utils import digest  # noqa: E402
from vispco.utils.journal import Journal  # noqa: E402

LLAVA = tiny_llava(layers=4, scale=0.5)
BATCHES = [batch(images=(1, 1), text=(9, 6), before=(2, 0), seed=s) for s in range(3)]
COMMAND = shlex.split(
    "search --budgets 0.4,0.8 --steps 2 --refinement 1 --limit 8 --batch-size 4 --quiet"
)
#: The modules whose random draws are noted down.
SOLVERS = [f"vispco.solvers.{name}" for name in ("descent", "refine", "shared", "steps")]


def stand_in():
    """A random model of four narrow layers, and its processor.

    It has the testbed's words and images.
    """
    from transformers import LlavaForConditionalGeneration

    config = build_config()
    narrow = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    for key, value in narrow.items():
        setattr(config.text_config, key, value)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval(), build_processor()


def watched(trace):
    """Note down what a search goes through.

    The optimiser's state after each step, the multipliers, every random draw.
    """

    def name(tensors):
        return digest.of_tensors((str(i), t) for i, t in enumerate(tensors))[:12]

    step, update = torch.optim.Adam.step, alm.AugmentedLagrangian.update

    def noted_step(self, *args, **kwargs):
        step(self, *args, **kwargs)
        parameters = [p for group in self.param_groups for p in group["params"]]
        states = [v for p in parameters for v in self.state[p].values()]
        trace.append(
            ["step", name([*parameters, *states]), [group["lr"] for group in self.param_groups]]
        )

    def noted_update(self, slack):
        update(self, slack)
        trace.append(["multipliers", self.state_dict()])

    def noted_draw(draw):
        def drawn(*args, **kwargs):
            found = draw(*args, **kwargs)
            if sys._getframe(1).f_globals["__name__"] in SOLVERS:
                trace.append([draw.__name__, name([found])])
            return found

        return drawn

    torch.optim.Adam.step, alm.AugmentedLagrangian.update = noted_step, noted_update
    for draw in (torch.randperm, torch.rand, torch.randn, torch.randint):
        setattr(torch, draw.__name__, noted_draw(draw))


def result(folder, frontier, trace, steps):
    meta = {k: v for k, v in frontier.meta.items() if k != "seconds"}
    points = [p.to_dict() for p in frontier.points]
    found = {"points": points, "meta": meta, "trace": trace, "steps": steps}
    (folder / "result.json").write_text(json.dumps(found))


def search(folder):
    """With an estimator that draws noise."""
    trace, steps = [], []
    watched(trace)
    start = vispco.Gradient(steps=6, inner=2, estimator="gumbel")
    journal = {"journal": folder / "journal.jsonl"}
    frontier = vispco.search(
        LLAVA,
        BATCHES,
        budgets=[0.5],
        start=start,
        refinement=2,
        options=journal,
        callback=steps.append,
    )
    result(folder, frontier, trace, steps)


def amortise(folder):
    """Both halves, each with a journal of its own, and a predictor that looks at the prompts."""
    trace, steps = [], []
    watched(trace)
    start = vispco.Shared(steps=5, conditioned=True)
    journal = {"journal": folder / "journal.jsonl"}
    learned = vispco.search(
        LLAVA, BATCHES, budgets=(), start=start, options=journal, callback=steps.append
    )
    frontier = learned.frontier([0.5], refinement=2, journal=folder / "frontier-journal.jsonl")
    result(folder, frontier, trace, steps)


def command(folder, words):
    """As a user starts it, and goes on."""
    return cli.main([*COMMAND, "--output", str(folder / "run"), *words])


def cache(folder):
    """The reproduction's measurements, each as long as the pipe of a process."""
    kept = Cache(folder / "cache")
    for number in range(400):
        kept.get(str(number), lambda number=number: [number] * 20_000)


def prepare_end(how, when):
    """Arrange for the end of this process."""
    append, replace, left = Journal._append, os.replace, [when]

    def end(*_):
        left[0] -= 1
        return not left[0]

    def die(signal_=signal.SIGKILL):
        os.kill(os.getpid(), signal_)

    def appended(self, entry):
        last = end()
        if last and how == "torn":
            line = json.dumps(entry).encode()
            self._file.write(line[: len(line) * (1 + when % 3) // 4])
            self._file.flush()
        if last and how != "after":
            die(signal.SIGINT if how == "interrupt" else signal.SIGKILL)
        append(self, entry)
        if last:
            die()

    def replaced(*args):
        if end():
            die()
        replace(*args)

    if how == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (when, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    elif how == "replace":
        os.replace = replaced
    else:
        Journal._append = appended


def child(request):
    """Run in the fork; never returns."""
    folder = Path(request["folder"])
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if request["end"] and request["end"][0] != "seconds":
            prepare_end(*request["end"])
        runs = {
            "search": search,
            "amortise": amortise,
            "command": partial(command, words=request["words"]),
            "cache": cache,
        }
        with (
            open(folder / "out", "w") as out,
            open(folder / "err", "w") as err,
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = runs[request["run"]](folder) or 0
    except BaseException:
        (folder / "err").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def main():
    made = stand_in()
    testbed.load = lambda name="testbed", dtype=None: made
    # Without it, the report has no pictures of tokens, which would take most of the time.
    sys.modules["matplotlib"] = None
    # This imports what draws the questions.
    testbed.examples("calibration", 8)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        pid = os.fork()
        if not pid:
            child(request)
        if request["end"] and request["end"][0] == "seconds":
            time.sleep(request["end"][1])
            os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        folder = Path(request["folder"])
        files = {name: folder / name for name in ("out", "err")}
        answer = {
            "code": os.waitstatus_to_exitcode(status),
            **{name: file.read_text() if file.exists() else "" for name, file in files.items()},
            "seconds": time.perf_counter() - started,
            "cpu": usage.ru_utime + usage.ru_stime,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
