"""The model `vispco` of lmms-eval.

Found by its registry, and run by its command line on a task made here, offline.

lmms-eval brings some 150 packages and is not in the extra `test`:
`pip install "vispco[eval,test]"`, then `python -m pytest tests/test_lmms_eval.py`.
"""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vispco
from vispco import testbed
from vispco.testbed.data import collate

pytest.importorskip("lmms_eval", reason='needs lmms-eval: pip install "vispco[eval]"')
from vispco.integrations.lmms_eval import VispcoModel, cut, generation_options

N = 48
TASK = """
task: boards
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.picture
doc_to_text: question
doc_to_target: answer
process_results: !function utils.grade
generation_kwargs:
  {{max_new_tokens: 4, temperature: 0, until: ["ASSISTANT:"], image_aspect_ratio: pad}}
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
def picture(doc): return [doc["image"]]
def grade(doc, results): return {"right": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def items():
    return testbed.examples("test", N, seed=3, tasks=("place", "find", "count", "relation"))


@pytest.fixture(scope="module")
def task(items, tmp_path_factory):
    """A folder with a task of lmms-eval.

    Its description, its functions, and questions with pictures (parquet).
    """
    from datasets import Dataset
    from PIL import Image

    folder = tmp_path_factory.mktemp("task")
    Dataset.from_dict(
        {
            "image": [Image.fromarray(item.image) for item in items],
            "question": [item.question for item in items],
            "answer": [item.answer for item in items],
        }
    ).to_parquet(folder / "boards.parquet")
    (folder / "boards.yaml").write_text(TASK.format(data=folder / "boards.parquet"))
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.fixture(scope="module", params=["testbed-llava", "testbed-qwen"])
def folder(request, tmp_path_factory):
    """A local model folder as `save_pretrained` writes it, and a pruning configuration in it."""
    model, processor = testbed.load(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    layers = model.config.text_config.num_hidden_layers
    vispco.PruningConfig.from_fastv(2, 0.75, num_layers=layers).save(folder / "pruning.json")
    return folder


def command_line(folder, task, output, model_args=""):
    """Runs lmms-eval.

    Returns the score it reports and its answers, in the order of the questions.
    """
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lmms_eval",
            "--model",
            "vispco",
            "--model_args",
            f"pretrained={folder}{model_args}",
            "--include_path",
            task,
            "--tasks",
            "boards",
            "--batch_size",
            "16",
            "--device",
            "cpu",
            "--log_samples",
            "--output_path",
            output,
        ],
        capture_output=True,
        text=True,
        cwd=output,
        timeout=500,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(output / "cache"),
            "OMP_NUM_THREADS": "1",
        },
    )
    results = list(output.rglob("*_results.json"))
    assert done.returncode == 0 and len(results) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    score = json.loads(results[0].read_text())["results"]["boards"]["right,none"]
    (samples,) = output.rglob("*_samples_boards.jsonl")
    samples = sorted(
        map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"]
    )
    return score, [sample["filtered_resps"] for sample in samples]


def independent(folder, items, config):
    """The same questions without lmms-eval, processor or chat template.

    The testbed's own inputs, one at a time.
    """
    name = "testbed-qwen" if "qwen" in folder.name else "testbed-llava"
    model, processor = testbed.load(name)
    answers = []
    with torch.inference_mode(), nullcontext() if config is None else vispco.apply(model, config):
        for item in items:
            inputs = collate([item], with_answers=False, model=name)
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ]
            answers.append(processor.tokenizer.decode(output, skip_special_tokens=True))
    return answers


def test_lmms_eval_finds_the_model_by_the_entry_point():
    from lmms_eval.models import get_model, list_available_models

    if "vispco" not in list_available_models():
        pytest.fail("vispco is not installed together with its entry points: pip install -e .")
    assert get_model("vispco") is VispcoModel


def test_scores_agree_with_an_independent_count_in_full_and_pruned(folder, task, items, tmp_path):
    right = {}
    for name, model_args in (
        ("full", ""),
        ("pruned", f",pruning_config={folder / 'pruning.json'}"),
    ):
        config = vispco.PruningConfig.load(folder / "pruning.json") if name == "pruned" else None
        (tmp_path / name).mkdir()
        score, answers = command_line(folder, task, tmp_path / name, model_args)
        assert answers == independent(folder, items, config)
        right[name] = sum(
            answer == item.answer for answer, item in zip(answers, items, strict=True)
        )
        assert score == pytest.approx(right[name] / N)
    assert right["full"] > 0.9 * N and 0 < right["pruned"] < right["full"]


def test_the_page_of_the_eight_benchmarks_names_tasks_and_metrics_that_there_are():
    from lmms_eval.tasks import TaskManager

    manager = TaskManager()
    page = (Path(vispco.__file__).parents[1] / "docs/lmms-eval.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1:5] for row in page.split("| benchmark |")[1].splitlines()[2:10]]
    assert [row[0].strip() for row in rows] == [
        "A-OKVQA",
        "VizWiz",
        "SEED-Evaluator",
        "MMBench",
        "MME",
        "ChartQA",
        "OCRBench",
        "TextVQA",
    ]
    # In place of A-OKVQA.
    tasks = ["ok_vqa_val2014"]
    assert not [name for name in manager.all_tasks if "aokvqa" in name.replace("_", "")]
    for _, task, metrics, mind in rows:
        tasks += (named := re.findall("`(.*?)`", task))
        for name in named:
            config = manager._get_config(name)
            assert config["output_type"] == "generate_until"
            assert set(re.findall("`(.*?)`", metrics)) <= {
                metric["metric"] for metric in config["metric_list"]
            }
        assert {name for name in re.findall("`(.*?)`", mind) if name != "general"} <= set(
            manager.all_tasks
        )
    assert re.search("TASKS=(.*)", page)[1].split(",") == tasks
    assert "general" in {
        metric["metric"] for metric in manager._get_config("vmcbench")["metric_list"]
    }
    assert manager._get_config("seedbench_ppl")["output_type"] != "generate_until"


def request(model, item, options, number=0):
    """One request, as lmms-eval makes it for a chat model."""
    content = [{"type": "image", "url": item.image}, {"type": "text", "text": item.question}]
    model.task_dict.setdefault("t", {"test": {}})["test"][number] = [
        {"role": "user", "content": content}
    ]
    return SimpleNamespace(args=("", lambda messages: messages, options, number, "t", "test"))


def test_answers_keep_the_order_of_their_requests_when_options_differ(folder, items):
    """Requests with other options run in other batches; every answer goes back to its question."""
    model = VispcoModel(str(folder), device="cpu", batch_size="5")
    options = [{"max_new_tokens": 4}, {"max_new_tokens": 3, "until": "ASSISTANT:"}]
    got = model.generate_until(
        [request(model, item, options[i % 2], i) for i, item in enumerate(items[:12])]
    )
    assert got == independent(folder, items[:12], None)


def test_the_model_is_in_full_again_after_a_pruned_run(folder, items):
    """Hooks are there only while it generates.

    Afterwards the same model answers every question as the full one does.
    """
    model = VispcoModel(str(folder), str(folder / "pruning.json"), device="cpu", batch_size=8)
    requests = [request(model, item, {"max_new_tokens": 4}, i) for i, item in enumerate(items)]
    pruned, model.pruning = model.generate_until(requests), None
    assert pruned != model.generate_until(requests) == independent(folder, items, None)


@pytest.mark.parametrize("length", [3, 20])
def test_a_video_file_becomes_frames_taken_evenly_over_it(length, tmp_path):
    """Frame i is a grey of 10 i: the greys tell which frames were taken.

    A short video gives all it has.
    """
    import av
    import numpy as np

    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(length):
            frame = av.VideoFrame.from_ndarray(
                np.full((64, 64, 3), 10 * i, np.uint8), format="rgb24"
            )
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    model = SimpleNamespace(max_num_frames=5, fps=None)
    frames = VispcoModel._film(model, {"video": str(tmp_path / "v.mp4")})
    wanted = np.linspace(0, length - 1, min(5, length)).round()
    assert frames.places == wanted.astype(int).tolist() and frames.fps == 10
    # What encoding loses.
    found = np.array([np.asarray(frame).mean() for frame in frames])
    assert np.abs(found - 10 * wanted).max() <= 6
    given = VispcoModel._film(model, {"video": list(frames)})
    assert given == frames and given.fps is None and given.places == [*range(len(frames))]
    with pytest.raises(ValueError, match="list of its frames"):
        VispcoModel._film(model, {"video": np.zeros((3, 8, 8, 3))})
    with pytest.raises(ValueError, match="whole videos"):
        VispcoModel._film(model, {"video": "v.mp4", "video_start": 1.0})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "lacks pretrained"),
        ({"pretrained": "x", "prunning_config": "y"}, "unknown names: prunning_config"),
        ({"pretrained": "x", "dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size must be a whole number"),
        ({"pretrained": "x", "max_num_frames": 0}, "max_num_frames must be"),
        ({"pretrained": "x", "fps": 0}, "fps must be a positive number"),
        (
            {"pretrained": "x", "trust_remote_code": "yes"},
            "trust_remote_code must be True or False",
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(ValueError, match=message):
        VispcoModel(**arguments)


def test_what_does_not_fit_the_model_is_refused_before_the_first_question(folder, tmp_path):
    vispco.PruningConfig("fastv", [1, 1, 0.5]).save(tmp_path / "three.json")
    with pytest.raises(ValueError, match="3 keep_ratios, but .* decoder layers"):
        VispcoModel(str(folder), str(tmp_path / "three.json"), device="cpu")
    with pytest.raises(FileNotFoundError):
        VispcoModel(str(folder), str(tmp_path / "none.json"), device="cpu")


def test_a_processor_without_a_chat_template_needs_one(tmp_path):
    model, processor = testbed.load("testbed-llava")
    template, processor.chat_template, processor.tokenizer.chat_template = (
        processor.chat_template,
        None,
        None,
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template: pass chat_template=FILE"):
        VispcoModel(str(tmp_path), device="cpu")
    (tmp_path / "broken.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="broken.jinja: expected a Jinja template in UTF-8"):
        VispcoModel(str(tmp_path), device="cpu", chat_template=str(tmp_path / "broken.jinja"))
    (tmp_path / "mine.jinja").write_text(template)
    assert VispcoModel(
        str(tmp_path), device="cpu", chat_template=str(tmp_path / "mine.jinja")
    ).processor.chat_template


def test_other_kinds_of_request_are_refused_with_advice():
    for refused in (VispcoModel.loglikelihood, VispcoModel.generate_until_multi_round):
        with pytest.raises(
            NotImplementedError, match="choose a task with output_type generate_until"
        ):
            refused(None, [])


def test_decoding_is_greedy_unless_the_task_asks_for_a_temperature():
    assert generation_options({"temperature": 0.7, "top_p": 0.9})[0] == {
        "max_new_tokens": 1024,
        "temperature": 0.7,
        "top_p": 0.9,
        "do_sample": True,
    }
    for greedy in (
        {},
        {"temperature": 0, "do_sample": True},
        {"temperature": 0.7, "do_sample": False},
        {"top_p": 0.5},
    ):
        assert generation_options(greedy) == ({"max_new_tokens": 1024, "do_sample": False}, [])


def test_an_answer_ends_at_the_first_of_its_stop_strings():
    assert cut("a\n\nb STOP c", ["STOP", "\n\n", ""]) == "a" and cut(" a ", []) == "a"
