"""Two processes find what one process finds on the same batches.

They do not meet unless they are asked to.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import vispco
from vispco import data, testbed
from vispco.commands.questions import load_questions
from vispco.utils import distributed

HERE = Path(__file__).parent


def launch(processes, *arguments):
    """A module or script under torchrun; raises with its stderr."""
    command = (
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0",
        ]
        if processes > 1
        else [sys.executable]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{(processes, rank): what it found}."""
    folder = tmp_path_factory.mktemp("shared")
    for processes in (1, 2):
        launch(processes, HERE / "share_work.py", folder)
    return {
        tuple(map(int, path.stem.split("-"))): json.loads(path.read_text())
        for path in folder.iterdir()
    }


def close(a, b):
    return torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=2e-3, atol=2e-4)


def test_sums_and_rows_of_all(found):
    assert found[2, 0]["total"] == found[2, 1]["total"] == [2.0, 1.0]
    assert found[2, 0]["gathered"] == found[2, 1]["gathered"] == [[0, 0], [1, 1], [1, 1]]
    assert found[1, 0]["total"] == [1.0, 0.0] and found[1, 0]["processes"] == 1
    assert all(one["told"] == ["é, said process 0", "", None] for one in found.values())


def test_both_find_the_same(found):
    assert found[2, 0] == found[2, 1]


def test_an_evaluation_is_that_of_all_questions(found):
    one, two = found[1, 0]["accuracy"], found[2, 0]["accuracy"]
    assert (
        one.keys() == two.keys()
        and one["n"] == two["n"] == 24
        and one["accuracy"] == two["accuracy"]
    )
    close(list(one.values()), list(two.values()))


def test_every_step_has_the_loss_and_the_gradient_of_the_whole_batch(found):
    one, two = found[1, 0]["steps"], found[2, 0]["steps"]
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        close(list(a.values()), list(b.values()))


def test_the_refinement_measures_the_same_schedules_to_the_same_loss(found):
    one, two = found[1, 0]["refinement"], found[2, 0]["refinement"]
    assert one and [(s["budget"], s["schedule"]) for s in one] == [
        (s["budget"], s["schedule"]) for s in two
    ]
    for name in ("loss", "best"):
        close([s[name] for s in one], [s[name] for s in two])


@pytest.mark.parametrize("name", ["search", "multi_step", "amortised", "conditioned"])
def test_two_processes_find_what_one_finds(found, name):
    one, two = found[1, 0]["frontiers"][name], found[2, 0]["frontiers"][name]
    assert (
        one["tokens"] == two["tokens"]
        and one["passes"] == two["passes"]
        and one["samples"] == two["samples"] == 24
    )
    close(one["loss"], two["loss"])
    close(one["flops"], two["flops"])


def strip(line):
    """What a line of a journal says, without the time it took."""
    entry = json.loads(line)
    return entry["of"], entry["value"]


def test_the_command_line_under_torchrun_writes_once_what_one_process_writes(tmp_path):
    options = [
        "search",
        "--model",
        "testbed",
        "--limit",
        16,
        "--batch-size",
        8,
        "--budgets",
        "0.5",
        "--steps",
        2,
        "--refinement",
        1,
        "--quiet",
        "--json",
        "--output",
    ]
    shown = [
        json.loads(launch(n, "-m", "vispco", *options, tmp_path / str(n)).stdout) for n in (1, 2)
    ]
    one, two = (json.loads((tmp_path / str(n) / "frontier.json").read_text()) for n in (1, 2))
    assert [p["config"]["keep_ratios"] for p in one["points"]] == [
        p["config"]["keep_ratios"] for p in two["points"]
    ]
    assert shown[0]["configurations"][0]["tokens"] == shown[1]["configurations"][0]["tokens"]
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == sorted(
        p.name for p in (tmp_path / "2").iterdir()
    )
    # As if both had been killed in the middle of a line. The first process tells the second what is
    # known; they end where they had ended.
    journal = tmp_path / "2" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:6]) + lines[6][:20])
    again = json.loads(launch(2, "-m", "vispco", *options, tmp_path / "2", "--resume").stdout)
    assert len(lines) > 8 and again["configurations"] == shown[1]["configurations"]
    assert [strip(line) for line in lines] == [
        strip(line) for line in journal.read_bytes().splitlines()
    ]
    assert json.loads(lines[0])["of"]["processes"] == 2


def test_an_evaluation_under_torchrun_prints_once_what_one_process_measures(tmp_path):
    vispco.PruningConfig.from_fastv(2, 0.75, num_layers=8).save(tmp_path / "c.json")
    options = [
        "evaluate",
        "--config",
        tmp_path / "c.json",
        "--limit",
        21,
        "--batch-size",
        8,
        "--quiet",
        "--json",
    ]
    one, two = (json.loads(launch(n, "-m", "vispco", *options).stdout) for n in (1, 2))
    for a, b in zip(
        [one["full"], *one["configurations"]], [two["full"], *two["configurations"]], strict=True
    ):
        assert a["tasks"] == b["tasks"] and len(a["tasks"]) > 3 and a["interval"] == b["interval"]
        close([a["kl"], a["flops"]], [b["kl"], b["flops"]])
    assert 0 < one["configurations"][0]["accuracy"] < one["full"]["accuracy"]


def test_what_is_shown_before_the_start_are_the_questions_of_ones_own_rows(
    monkeypatch, tmp_path, capsys
):
    model, processor = testbed.load("testbed-llava")
    with open(tmp_path / "q.jsonl", "w") as file:
        for i, e in enumerate(testbed.examples("test", 14)):
            Image.fromarray(e.image).save(tmp_path / f"{i}.png")
            file.write(
                json.dumps(
                    {
                        "image": f"{i}.png",
                        "question": e.question,
                        "answer": e.answer,
                        "task": str(i),
                    }
                )
                + "\n"
            )
    options = SimpleNamespace(
        data=str(tmp_path / "q.jsonl"),
        limit=14,
        seed=0,
        images=None,
        columns=None,
        split=None,
        max_pixels=10**6,
        batch_size=4,
        tasks=None,
        model="testbed",
        chat_template=None,
        frames=8,
        fps=None,
        quiet=False,
    )
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    asked = load_questions(options, "test")
    sample, parts = data.draw(options.data, 14), []
    for first in range(2):
        monkeypatch.setattr(distributed, "rank", lambda first=first: first)
        # Drops the progress bars that were printed.
        capsys.readouterr()
        made = asked.batches(model, processor)
        words = [
            processor.tokenizer.decode(row[row != -100])
            for batch in made
            for row in batch["labels"]
        ]
        own = [c for i in range(0, 14, 4) for c in sample.conversations[i : i + 4][first::2]]
        assert words == [f"{c.turns[0][1]} <eos>" for c in own]
        parts += [c.task for c in own]
        counts, *shown = capsys.readouterr().err.splitlines()
        assert "14 questions, 14 drawn" in counts and len(shown) == 3
        # The first questions of its own are shown.
        for c, line in zip(own, shown, strict=False):
            assert f"-> {c.turns[0][1]}; labelled: '{c.turns[0][1]} <eos>'" in line
    assert asked.tasks == parts


def test_alone_everything_is_as_it_was():
    x = torch.arange(3.0, requires_grad=True)
    assert distributed.total(x) is x and distributed.gathered(x) is x and distributed.count(7) == 7
    assert distributed.share([1, 2, 3]) == [1, 2, 3] and (
        distributed.rank(),
        distributed.processes(),
    ) == (0, 1)


def test_a_batch_too_small_to_share_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "processes", lambda: 4)
    with pytest.raises(
        ValueError,
        match="a batch of 3 questions cannot be shared by 4 processes: choose a batch size",
    ):
        distributed.share([1, 2, 3])


def test_processes_that_were_not_asked_to_do_not_meet(monkeypatch):
    """A user's own process group is none of ours: nothing is sent outside of `together`."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a: pytest.fail("nobody asked"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert float(distributed.total(torch.tensor(3.0))) == 3
