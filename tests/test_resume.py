"""A search that is killed at any moment loses at most one step.

It ends bit for bit as if it had never been stopped.
"""

import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from inspect import signature
from pathlib import Path
from unittest import mock

import pytest
import torch

import vispco
from tests.reproduction.cache import Cache
from tiny import batch, search_with, tiny_llava
from vispco.baselines.searchers import random_search
from vispco.budget import Budget
from vispco.calibration import prepare, run_teacher, shapes
from vispco.registry import adapter_for
from vispco.solvers.problem import cost_models
from vispco.solvers.refine import Evaluator
from vispco.utils import files, journal as journals
from vispco.utils.files import locked
from vispco.utils.journal import Journal, decode_tensor, differences, encode_tensor

HERE = Path(__file__).parent
# Of the moments at which processes are killed. Tests print what they do, and pytest shows it
# where one fails.
SEED = 0


# ---- real processes, killed ----------------------------------------------------------------------
@pytest.fixture(scope="module")
def run():
    """run(what, folder, how, when, words=...): a search in a process of its own.

    The process may be killed (`resume_worker.py`).
    """
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    worker = subprocess.Popen(
        [sys.executable, str(HERE / "resume_worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert json.loads(worker.stdout.readline()) == "ready"

    def ask(what, folder, *end, words=("--resume",)):
        folder.mkdir(exist_ok=True)
        print(what, folder.name, *end)
        worker.stdin.write(
            json.dumps({"run": what, "folder": str(folder), "end": end or None, "words": words})
            + "\n"
        )
        worker.stdin.flush()
        answer = json.loads(worker.stdout.readline())
        print("   ", answer["code"], f"{answer['seconds']:.2f} s, of a core {answer['cpu']:.2f} s")
        return answer

    yield ask
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0


def left_by(folder):
    """All that a finished search has left, except what no two runs share.

    That is the time it took, the times that it measured of the model, and where it lies.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("out", "err"):
            text = path.read_text().replace(str(folder), "FOLDER")
            text = re.sub(r'"prefill_seconds": \[[^]]*\]|-?[\d.e+-]+ m?s(?=[,<])', "", text)
            found[path.name] = re.sub(r'(seconds": )[\d.e+-]+(, "check": "\w+")?', "", text)
    return found


def lines(folder):
    """The whole lines of a folder's journals."""
    return [
        json.loads(line)
        for path in sorted(folder.rglob("*journal.jsonl"))
        for line in path.read_text().split("\n")[:-1]
    ]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """{what: (all that it leaves if nobody stops it, lines of its journal, seconds)}."""
    found = {}
    for what in ("search", "amortise", "command"):
        folder = tmp_path_factory.mktemp(what)
        answer = run(what, folder)
        assert answer["code"] == 0, answer["err"]
        found[what] = left_by(folder), len(lines(folder)), answer["seconds"]
    return found


@pytest.mark.parametrize("what, kills", [("search", 9), ("amortise", 6), ("command", 5)])
def test_killed_at_20_random_moments_it_ends_bit_for_bit_as_if_it_had_not_been(
    what, kills, run, whole, tmp_path
):
    """Of each search, the whole journey is compared.

    Optimiser, multipliers, every random draw, log, result.
    """
    expected, count, seconds = whole[what]
    draw, folder = random.Random(f"{SEED} {what}"), tmp_path / "run"
    before = 0
    while kills or before:
        left = count - before
        how = draw.choice(["seconds", *["before", "torn", "after"] * (left > 0)]) if kills else None
        when = (
            draw.uniform(0, 0.7 * seconds)
            if how == "seconds"
            else draw.randint(1, max(1, left // 2))
        )
        answer = run(what, folder, *([how, when] if how else []))
        now = len(lines(folder))
        assert answer["code"] in ((-9, 0) if how == "seconds" else (-9,) if how else (0,)), answer[
            "err"
        ]
        # At most one was lost.
        assert now >= before + {"after": when, "before": when - 1, "torn": when - 1}.get(how, 0)
        before, kills = now, kills - (answer["code"] == -9)
        if answer["code"] == 0:
            assert left_by(folder) == expected
            shutil.rmtree(folder)
            before = 0


def test_killed_while_the_results_are_written_each_file_is_whole_or_not_there(run, whole, tmp_path):
    # Two configurations, the frontier, the report.
    for when in (1, 3, 4):
        assert run("command", tmp_path, "replace", when)["code"] == -9
        named = sorted(
            p.name for p in (tmp_path / "run").iterdir() if p.suffix in (".json", ".html")
        )
        assert len(named) == when - 1
        assert all(json.loads((tmp_path / "run" / name).read_text()) for name in named)
        # It is of this process; the next clears it away.
        assert len(list((tmp_path / "run").glob(".vispco-*"))) == 1
    assert run("command", tmp_path)["code"] == 0
    assert left_by(tmp_path) == whole["command"][0]


def test_ctrl_c_says_how_to_go_on(run, whole, tmp_path):
    answer = run("command", tmp_path, "interrupt", 7)
    said = re.fullmatch("vispco: interrupted; `(.*)` goes on where it was\n", answer["err"])
    assert answer["code"] == 130 and not answer["out"] and said, answer["err"]
    words = shlex.split(said[1])
    assert words[:2] == ["vispco", "search"] and words[-3:] == [
        "--output",
        str(tmp_path / "run"),
        "--resume",
    ]
    assert len(lines(tmp_path)) == 6
    assert run("command", tmp_path)["code"] == 0
    assert left_by(tmp_path) == whole["command"][0]


def test_a_full_disk_is_one_line_and_the_search_goes_on_when_there_is_room(run, whole, tmp_path):
    answer = run("command", tmp_path, "full", 3000)
    journal = tmp_path / "run" / "journal.jsonl"
    assert answer["code"] == 2 and not answer["out"] and answer["err"].count("\n") == 1, answer[
        "err"
    ]
    assert (
        answer["err"].startswith(f"vispco: error: {journal}: File too large; `vispco search ")
        and "--resume` goes on" in answer["err"]
    )
    # The line that found no room.
    assert journal.stat().st_size == 3000 and not journal.read_text().endswith("\n")
    assert run("command", tmp_path)["code"] == 0
    assert left_by(tmp_path) == whole["command"][0]


def test_a_folder_is_one_process_s_alone(run, tmp_path):
    (tmp_path / "run").mkdir()
    with Journal(tmp_path / "run" / "journal.jsonl"):
        answer = run("command", tmp_path)
        assert answer["code"] == 2 and answer["err"].count("\n") == 1
        assert (
            f"{tmp_path / 'run' / 'journal.jsonl'}: another process is at work here"
            in answer["err"]
        )
        assert "another process is at work here" in run("search", tmp_path / "run")["err"]
    # It was empty.
    assert not (tmp_path / "run" / "journal.jsonl").exists()


def test_the_command_asks_what_to_do_with_an_earlier_search(run, whole, tmp_path):
    expected = whole["command"][0]
    assert run("command", tmp_path, "after", 8)["code"] == -9
    interrupted = (
        "run holds a search that was interrupted: choose another --output, --resume it, "
        "or --overwrite it"
    )
    for words, said in (
        ([], interrupted),
        (["--resume", "--overwrite"], "not allowed with"),
        (["--resume", "--steps", "3"], "steps was 2 and is 3"),
        (["--resume", "--limit", "4"], "questions was 8 and is 4"),
        (
            ["--resume", "--budgets", "0.4"],
            "is of another search: budgets was [0.4, 0.8] and is [0.4]",
        ),
    ):
        answer = run("command", tmp_path, words=words)
        assert answer["code"] == 2 and said in answer["err"] and answer["err"].count("\n") == 1, (
            answer["err"]
        )
        assert len(lines(tmp_path)) == 8
    assert run("command", tmp_path, "after", 3, words=["--overwrite", "--seed", "1"])["code"] == -9
    assert [line["of"].get("seed") for line in lines(tmp_path)] == [1, None, None]
    assert run("command", tmp_path, words=["--overwrite"])["code"] == 0
    # The report holds the command, so it differs.
    assert {**left_by(tmp_path), "report.html": ""} == {**expected, "report.html": ""}
    assert (
        "run holds a frontier.json: choose another --output, --resume it, or --overwrite it"
        in run("command", tmp_path, words=[])["err"]
    )
    (tmp_path / "run" / "report.html").unlink()
    answer = run("command", tmp_path)
    assert answer["code"] == 0 and left_by(tmp_path) == expected
    (tmp_path / "run" / "journal.jsonl").unlink()
    assert (
        "run holds a frontier.json: choose another --output, or --overwrite it"
        in run("command", tmp_path)["err"]
    )


def test_the_cache_of_the_reproduction_loses_at_most_one_measurement(run, tmp_path):
    draw = random.Random(SEED)
    for _ in range(3):
        run("cache", tmp_path, "seconds", draw.uniform(0, 0.4))
    kept = Cache(tmp_path / "cache")
    for number in range(400):
        assert kept.get(str(number), lambda number=number: [number] * 20_000) == [number] * 20_000
    print(f"{kept.hits} of 400 were there")


# ---- in this process -----------------------------------------------------------------------------
BATCHES = [batch(images=(1, 1), text=(9, 6), before=(2, 0), seed=s) for s in range(2)]
OPTIONS = {"budgets": [0.7], "steps": 2, "inner": 1, "refinement": 0}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The journal of a small search."""
    path = tmp_path_factory.mktemp("begun") / "journal.jsonl"
    search_with(tiny_llava(layers=3), BATCHES, **OPTIONS, journal=path)
    return path.read_bytes()


def resumed(begun, tmp_path, model=None, batches=BATCHES, **options):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(begun)
    with Journal(path) as journal:
        return search_with(
            model or tiny_llava(layers=3), batches, **{**OPTIONS, **options, "journal": journal}
        ), journal


def test_a_finished_search_computes_nothing_again_and_counts_its_time(begun, tmp_path):
    found, journal = resumed(begun, tmp_path)
    assert (journal.computed, journal.recalled) == (0, begun.count(b"\n") - 1)
    assert found.points == search_with(tiny_llava(layers=3), BATCHES, **OPTIONS).points
    assert (
        found.meta["seconds"]
        >= sum(json.loads(line)["seconds"] for line in begun.splitlines()) - 1e-3
        > 0
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"steps": 3}, "steps was 2 and is 3"),
        ({"inner": 2}, "inner was 1 and is 2"),
        ({"budgets": [0.7, 0.6]}, "budgets was [0.7] and is [0.7, 0.6]"),
        ({"method": "random"}, 'method was "fastv" and is "random"'),
        ({"kernel": "linear"}, 'kernel was "monotone"'),
        ({"learning_rate": 0.1}, "learning_rate was 0.2 and is 0.1"),
        ({"objective": "task"}, 'objective was "kl"'),
        ({"refinement": 1}, "refinement was 0 and is 1"),
        ({"relative_to": "total"}, "relative_to was"),
        ({"estimator": "paper"}, 'estimator was null and is "paper"'),
        ({"constraint": {"penalty": 1.0}}, 'constraint was null and is {"penalty": 1.0}'),
        ({"checkpoint": True}, "checkpoint was false"),
        ({"batches": BATCHES[:1]}, "questions was 4 and is 2"),
        ({"batches": BATCHES[::-1]}, ": data was"),
        ({"seed": 1, "steps": 3, "inner": 2, "refinement": 1}, "; and 1 more"),
    ],
)
def test_another_search_is_refused_by_name(begun, tmp_path, change, said):
    with pytest.raises(ValueError, match="is of another search: ") as error:
        resumed(begun, tmp_path, **change)
    assert said in str(error.value) and "start anew" in str(error.value)
    assert (tmp_path / "journal.jsonl").read_bytes() == begun


def test_another_model_other_versions_and_another_machine_are_refused(begun, tmp_path, monkeypatch):
    model = tiny_llava(layers=3)
    with torch.no_grad():
        weight = model.model.language_model.layers[1].mlp.up_proj.weight
        # One bit differs.
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    with pytest.raises(ValueError, match="another search: model was"):
        resumed(begun, tmp_path, model)
    model = tiny_llava(layers=3)
    model.config.text_config.rms_norm_eps *= 2
    with pytest.raises(ValueError, match="another search: model was"):
        resumed(begun, tmp_path, model)
    with pytest.raises(ValueError, match='dtype was "float32" and is "bfloat16"'):
        resumed(begun, tmp_path, tiny_llava(layers=3).bfloat16())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        with pytest.raises(ValueError, match="another search: threads was 1 and is 7"):
            resumed(begun, tmp_path)
    monkeypatch.setattr(journals, "versions", lambda: {"torch": "9.9"})
    with pytest.raises(ValueError, match='torch was ".*" and is "9.9"'):
        resumed(begun, tmp_path)


def test_the_journal_knows_every_argument(begun):
    """An argument that is added to `search` has to be added there."""
    ours = {
        name
        for part in (vispco.search, vispco.Gradient, vispco.SearchOptions)
        for name in signature(part).parameters
    }
    ours -= {"model", "batches", "options", "journal", "callback", "progress"}
    assert ours < set(json.loads(begun.splitlines()[0])["of"])


def test_a_loss_that_is_not_finite_leaves_the_last_good_step(tmp_path, monkeypatch):
    searching = sys.modules["vispco.solvers.descent"]
    model, path, right = tiny_llava(layers=3), tmp_path / "journal.jsonl", searching.mean_loss
    count = iter(range(9))
    monkeypatch.setattr(
        searching, "mean_loss", lambda *a: right(*a) * (float("nan") if next(count) == 1 else 1)
    )
    with pytest.raises(FloatingPointError, match="budget 0.7, step 1: the loss is nan"):
        search_with(model, BATCHES, **OPTIONS, journal=path)
    assert (
        max(json.loads(line)["of"].get("step", -1) for line in path.read_text().splitlines()) == 0
    )
    assert (
        search_with(model, BATCHES, **OPTIONS, journal=path).points
        == search_with(model, BATCHES, **OPTIONS).points
    )


def test_searches_without_a_gradient_have_a_journal_too(tmp_path):
    """Random search on a evaluator: what `evaluator.losses` measures is all that it costs."""
    model = tiny_llava(layers=3)
    prepared, cost = (
        run_teacher(model, prepare(model, BATCHES)),
        cost_models(adapter_for(model)(model))["flops"],
    )
    limit, found = Budget(0.7, cost, *shapes(prepared), 1), []
    for _ in range(2):
        with Journal(tmp_path / "journal.jsonl") as journal:
            journal.begin("random search", model, prepared, {"seed": 1})
            evaluator = Evaluator(model, prepared, {"method": "fastv"}, journal=journal)
            random_search(evaluator, limit, passes=4 * evaluator.samples, seed=1)
        found.append((evaluator.records, evaluator.passes, journal.computed))
        (tmp_path / "journal.jsonl").write_bytes((tmp_path / "journal.jsonl").read_bytes()[:-9])
    assert (
        found[0][:2] == found[1][:2]
        and len(found[0][0]) == 4
        and (found[0][2], found[1][2]) == (4, 1)
    )


# ---- the file ------------------------------------------------------------------------------------
ASKED = [
    ({"journal": "a test", "seed": 0}, None),
    *(({"step": i}, {"loss": i / 7, "gradient": "x" * i}) for i in range(6)),
]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The bytes of a journal, where none has to wait for a disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert ask_all(tmp_path / "journal.jsonl") == ([value for _, value in ASKED], 7)
    return (tmp_path / "journal.jsonl").read_bytes()


def ask_all(path):
    """All values, and how many were computed."""
    with Journal(path) as journal:
        return [
            journal.recall(of, lambda value=value: value) for of, value in ASKED
        ], journal.computed


def test_cut_at_any_byte_it_loses_the_line_that_was_cut(written, tmp_path):
    path = tmp_path / "journal.jsonl"
    for end in range(0, len(written) + 1, 3):
        path.write_bytes(written[:end])
        found, computed = ask_all(path)
        assert found == [value for _, value in ASKED] and computed == 7 - written[:end].count(b"\n")
        assert ask_all(path) == (found, 0)


def test_two_lines_are_not_taken_for_one(written, tmp_path):
    path, rows = tmp_path / "journal.jsonl", written.splitlines(keepends=True)
    for i in range(len(rows) - 1):
        joined = rows[i].rpartition(b', "check"')[0] + rows[i + 1]
        path.write_bytes(b"".join([*rows[:i], joined, *rows[i + 2 :]]))
        # The last line, which may have been cut off while it was written.
        if i + 2 == len(rows):
            assert ask_all(path)[0] == [value for _, value in ASKED]
        else:
            with pytest.raises(ValueError, match="start anew|no journal"):
                ask_all(path)


@pytest.mark.parametrize("seed", [0, 5000])
def test_damaged_it_is_refused_or_right(written, tmp_path, seed):
    path, draw, refused, times = tmp_path / "journal.jsonl", random.Random(seed), 0, 5000
    for _ in range(times):
        data, (start, end) = (
            bytearray(written),
            sorted(draw.randrange(len(written)) for _ in range(2)),
        )
        rows = written.splitlines(keepends=True)
        how = draw.randrange(5)
        if how == 0:
            data[start] ^= 1 << draw.randrange(8)
        elif how == 1:
            del data[start:end]
        elif how == 2:
            data[start:start] = draw.randbytes(draw.randint(1, 9))
        elif how == 3:
            data = bytearray(b"".join(draw.sample(rows, draw.randint(1, len(rows)))))
        else:
            data[start:start] = data[end:]
        path.write_bytes(data)
        try:
            assert ask_all(path)[0] == [value for _, value in ASKED], bytes(data)
        except ValueError as error:
            refused += 1
            assert "start anew" in str(error) or "no journal" in str(error)
            assert path.read_bytes() == data
    assert times / 3 < refused < times


@pytest.mark.parametrize("text", ["notes\n", "{}", '{"of": 1}\n{"of": 2}\n', "\0" * 100, "\n"])
def test_what_is_no_journal_is_left_alone(text, tmp_path):
    path = tmp_path / "notes"
    path.write_text(text)
    with (
        pytest.raises(ValueError, match="notes is no journal of a search"),
        Journal(path) as journal,
    ):
        journal.recall({"journal": "a test"}, lambda: pytest.fail("ran"))
    assert path.read_text() == text


def test_what_was_asked_for_must_be_what_is_asked_for(written, tmp_path):
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.recall(*ASKED[0][:1], lambda: None)
        with pytest.raises(
            ValueError, match="is of another search: step was 0 and is 1; resume with the same"
        ):
            journal.recall({"step": 1}, lambda: pytest.fail("ran"))
    assert (
        differences({"a": 1}, {"b": "x" * 99})
        == "a was 1 and is not there; b was not there and is ..."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_come_back_to_the_bit(dtype):
    tensor = torch.tensor([[0.1, -0.0, float("nan")], [float("-inf"), 1e-45, 3.0]], dtype=dtype)
    back = decode_tensor(encode_tensor(tensor.T), tensor.T.contiguous())
    assert back.dtype == dtype and torch.equal(
        back.view(torch.uint8), tensor.T.contiguous().view(torch.uint8)
    )


# ---- atomic writes -------------------------------------------------------------------------------
def fork(work):
    """A process that does this work; its exit code is 0 if nothing was raised."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def test_what_a_killed_write_left_goes_with_the_next_but_not_what_a_living_process_writes(
    tmp_path, monkeypatch
):
    told, tell = os.pipe()

    def stuck():
        os.fsync = lambda _: (os.write(tell, b"."), signal.pause())
        files.write_text(tmp_path / "a.txt", "half of it")

    kept = [
        tmp_path / name
        for name in (".vispco-notes", ".vispco-UPPERCAS", "vispco-abcdefgh", ".vispco-abcdefgh.txt")
    ]
    for path in kept:
        path.write_text("not ours")
    (tmp_path / ".vispco-folder_1").mkdir()
    (tmp_path / ".vispco-a_link_1").symlink_to(kept[0])
    kept += [tmp_path / ".vispco-folder_1", tmp_path / ".vispco-a_link_1"]
    pid = fork(stuck)
    os.read(told, 1)
    files.write_text(tmp_path / "b.txt", "b")
    (temporary,) = {*tmp_path.iterdir()} - {*kept, tmp_path / "b.txt"}
    assert temporary.read_text() == "half of it"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert temporary.exists()
    files.write_text(tmp_path / "c.txt", "c")
    assert {*tmp_path.iterdir()} == {*kept, tmp_path / "b.txt", tmp_path / "c.txt"}
    os.close(told)
    os.close(tell)


def test_processes_that_write_to_one_folder_do_not_disturb_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def work(name):
        for i in range(150):
            files.write_text(tmp_path / f"{i % 2}", name * 5000)

    children = [fork(lambda name=name: work(name)) for name in "abc"]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]
    assert all(
        len(text := path.read_text()) == 5000 and text == text[0] * 5000
        for path in tmp_path.iterdir()
    )


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_temporary_file_that_is_cleared_before_it_is_locked_is_made_again(
    when, tmp_path, monkeypatch
):
    lock, seen = files._lock, []

    def late(file):
        seen.append(file.name)
        if len(seen) == 1:
            if when != "after":
                os.unlink(file.name)
            # The other process holds the lock still, and unlinks it soon.
            if when != "before":
                raise OSError(errno.EWOULDBLOCK, "Resource temporarily unavailable")
        lock(file)

    monkeypatch.setattr(files, "_lock", late)
    files.write_text(tmp_path / "a.txt", "a")
    assert (
        len(set(seen)) == 2
        and (tmp_path / "a.txt").read_text() == "a"
        and len(list(tmp_path.iterdir())) == 1
    )


def test_where_there_are_no_locks_what_is_written_is_whole_and_nothing_is_cleared(
    tmp_path, monkeypatch
):
    def unsupported(file):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(files, "_lock", unsupported)
    (tmp_path / ".vispco-abcdefgh").write_text("left")
    files.write_text(tmp_path / "a.txt", "a")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == [".vispco-abcdefgh", "a.txt"]
        and (tmp_path / "a.txt").read_text() == "a"
    )


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a.txt", "before")
    for name, error in (
        ("fsync", OSError(errno.ENOSPC, "No space left on device")),
        ("replace", KeyboardInterrupt()),
    ):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(os, name, mock.Mock(side_effect=error))
            files.write_text(tmp_path / "a.txt", "after")
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and (
            tmp_path / "a.txt"
        ).read_text() == "before"


# ---- the lock ------------------------------------------------------------------------------------
def test_a_file_that_was_taken_away_while_it_was_opened_is_opened_again(tmp_path, monkeypatch):
    """A lock may be on a file that was removed meanwhile.

    Who waits for the lock of a file that its last user removes would else hold a lock on nothing.
    """
    path, lock, calls = tmp_path / "journal.jsonl", files._lock, []
    monkeypatch.setattr(
        files, "_lock", lambda file: (calls.append(1), lock(file), len(calls) > 1 or path.unlink())
    )
    with locked(path) as file:
        assert len(calls) == 2 and os.path.samestat(os.fstat(file.fileno()), path.stat())


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch):
    def unsupported(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files, "_lock", unsupported)
    with pytest.warns(
        UserWarning, match="cannot be locked .Operation not supported.: let no other process"
    ):
        locked(tmp_path / "journal.jsonl").close()


def test_windows_locks_too(tmp_path, monkeypatch):
    held = []

    class msvcrt:
        LK_NBLCK = 2

        @staticmethod
        def locking(handle, mode, count):
            if held:
                raise OSError(13, "Permission denied")
            held.append((os.lseek(handle, 0, os.SEEK_CUR), mode, count))

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    with Journal(tmp_path / "journal.jsonl") as journal:
        assert held == [(1 << 30, 2, 1)]
        with pytest.raises(ValueError, match="another process is at work here"):
            Journal(tmp_path / "journal.jsonl")
        assert journal.recall({"journal": "a test"}, lambda: 1) == 1
    assert (tmp_path / "journal.jsonl").read_text().startswith('{"of": {"journal"')
