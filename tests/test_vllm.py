"""The plug-in for vLLM against the plain call: the answers of `vispco.apply` in transformers.

vLLM wants its own environment and is not in the extra `test`. docs/serving-vllm.md says how to
make one, here without a GPU; there, `python -m pytest tests/test_vllm.py`.
"""

import base64
import gc
import io
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM in its own environment: see docs/serving-vllm.md")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
from PIL import Image
from transformers import AutoModelForImageTextToText
from vllm import LLM, SamplingParams

import vispco
from vispco import testbed
from vispco.integrations.vllm import VARIABLE, register
from vispco.testbed.data import collate
from vllm_checkpoints import saved, tiny_qwen3_vl

N = 64
LAYERS = {"testbed-llava": 8, "testbed-qwen": 16, "qwen3-vl": 4}
#: So small that prompts come in several parts, which cut pictures.
SETTINGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 200,
    "max_num_batched_tokens": 48,
    "block_size": 32,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the models, as vLLM reads them."""
    root = tmp_path_factory.mktemp("models")
    found = {name: saved(name, root / name) for name in ("testbed-llava", "testbed-qwen")}
    found["qwen3-vl"] = tiny_qwen3_vl(root / "qwen3-vl", found["testbed-qwen"])
    return found


@pytest.fixture
def served(folders, tmp_path, monkeypatch):
    """`served(name, method, ratio, **settings)`: a vLLM of the model, and the configuration."""
    made = []

    def serve(name, method="divprune", ratio=0.25, **settings):
        config = vispco.PruningConfig(method, [ratio] * LAYERS[name])
        config.save(tmp_path / "config.json")
        monkeypatch.setenv(VARIABLE, str(tmp_path / "config.json"))
        # vLLM does, but once in a process, even if that fails.
        register()
        limits = {"limit_mm_per_prompt": {"image": 2, "video": 0}}
        made.append(LLM(str(folders[name]), **{**SETTINGS, **limits, **settings}))
        return made[0], config

    yield serve
    for llm in made:
        llm.llm_engine.engine_core.shutdown()
    made.clear()
    gc.collect()


def plain(folders, name):
    """The same model in transformers."""
    return AutoModelForImageTextToText.from_pretrained(folders[name]).eval()


def image_id(model):
    config = model.config
    return getattr(config, "image_token_index", None) or config.image_token_id


def asked(model, ids, pictures, kind="image"):
    """A prompt for vLLM: one token stands for each picture. ids: with one for each token."""
    marks = {image_id(model), getattr(model.config, "video_token_id", None)}
    short = [i for i, run in groupby(ids) for i in ([i] if i in marks else list(run))]
    return {"prompt_token_ids": short, "multi_modal_data": {kind: pictures}}


def answers(llm, prompts, tokens=4):
    """Token ids of each answer, the log-probability of its first, and the outputs."""
    greedy = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, stop_token_ids=[1])
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    each = [output.outputs[0] for output in outputs]
    first = [answer.logprobs[0][answer.token_ids[0]].logprob for answer in each]
    return [list(answer.token_ids) for answer in each], torch.tensor(first), outputs


@torch.no_grad()
def reference(model, config, batches, tokens=4):
    """The same, by `vispco.apply`, one prompt at a time."""
    found, first = [], []
    with vispco.apply(model, config):
        for inputs in batches:
            output = model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
            # Rows end with the end token.
            found.append(new)
            first.append(output.logits[0][0].log_softmax(-1)[new[0]])
    return found, torch.stack(first)


@pytest.fixture(scope="module")
def items():
    return testbed.examples("test", N, seed=3)


def inputs_of(items, name):
    return [collate([item], with_answers=False, model=name) for item in items]


@pytest.mark.parametrize("method", ["divprune", "visionzip", "hiprune", "vispruner", "pool"])
@pytest.mark.parametrize("name", ["testbed-llava", "testbed-qwen"])
def test_the_answers_are_those_of_apply(folders, served, items, name, method):
    """Features, grid, attention of the tower at two depths, merging; prompts cut anywhere."""
    llm, config = served(name, method)
    model, batches = plain(folders, name), inputs_of(items, name)
    prompts = [
        asked(model, batch["input_ids"][0].tolist(), Image.fromarray(item.image))
        for batch, item in zip(batches, items, strict=True)
    ]
    found, first, outputs = answers(llm, prompts)
    expected, right = reference(model, config, batches)
    assert found == expected
    assert (first - right).abs().median() < 1e-4
    # 16 of 64 tokens.
    for batch, output in zip(batches, outputs, strict=True):
        assert len(output.prompt_token_ids) == batch["input_ids"].shape[1] - 48


@pytest.mark.parametrize("name", ["testbed-llava", "testbed-qwen"])
def test_a_prefix_that_ends_within_a_picture_is_taken_from_the_cache(folders, served, items, name):
    llm, config = served(name, "vispruner", 0.75)
    model = plain(folders, name)
    # Every question, of the first picture alone.
    items = [testbed.Example(items[0].image, item.question, "", "") for item in items[:16]]
    batches = inputs_of(items, name)
    picture = Image.fromarray(items[0].image)
    prompts = [asked(model, batch["input_ids"][0].tolist(), picture) for batch in batches]
    expected, right = reference(model, config, batches)
    first = [answers(llm, [prompt]) for prompt in prompts]
    assert [tokens for (tokens,), _, _ in first] == expected
    assert [outputs[0].num_cached_tokens for _, _, outputs in first] == [0] + [32] * 15
    assert (torch.cat([each for _, each, _ in first]) - right).abs().max() < 1e-4


def kept_alone(model, config, batch):
    """(S,) bool: the tokens of a prompt with one picture that `vispco.apply` keeps."""
    with torch.no_grad(), vispco.apply(model, config) as handle:
        model(**batch)
    return handle.kept()[0][0]


@torch.no_grad()
def by_hand(model, name, config, items):
    """Logits (V,) after a prompt with a picture of each item, and the last one's question.

    Of each picture stay the tokens that it keeps alone, at the positions of the whole prompt.
    Second result: the ids of the whole prompt.
    """
    batches = inputs_of(items, name)
    ids = [batch["input_ids"][0] for batch in batches]
    kept = [kept_alone(model, config, batch) for batch in batches]
    # All but the last end with the picture, of Qwen with the token that closes it.
    ends = [int((each == image_id(model)).nonzero()[-1]) + 1 for each in ids]
    cuts = [end + (name == "testbed-qwen") for end in ends[:-1]] + [None]
    whole = torch.cat([each[:cut] for each, cut in zip(ids, cuts, strict=True)])
    kept = torch.cat([each[:cut] for each, cut in zip(kept, cuts, strict=True)])
    names = [key for key in ("pixel_values", "image_grid_thw") if key in batches[0]]
    media = {key: torch.cat([batch[key] for batch in batches]) for key in names}
    visual = whole == image_id(model)
    embeds = model.get_input_embeddings()(whole)
    embeds[visual] = torch.cat(list(model.get_image_features(**media).pooler_output))
    positions = torch.arange(len(whole))[None]
    if name == "testbed-qwen":
        grids = {"image_grid_thw": media["image_grid_thw"]}
        positions, _ = model.model.get_rope_index(
            whole[None], mm_token_type_ids=visual.long()[None], **grids
        )
    output = model(inputs_embeds=embeds[None, kept], position_ids=positions[..., kept])
    return output.logits[0, -1], whole.tolist()


@pytest.mark.parametrize(
    ("name", "pictures", "ratio"),
    [("testbed-llava", 2, 0.25), ("testbed-qwen", 2, 0.25), ("testbed-llava", 6, 1 / 64)],
)
def test_each_of_several_pictures_keeps_its_own_share(
    folders, served, items, name, pictures, ratio
):
    """Those of LLaVA stand next to each other. Six have more positions than the model's 256."""
    llm, config = served(name, ratio=ratio, limit_mm_per_prompt={"image": pictures, "video": 0})
    model = plain(folders, name)
    prompts, right, best = [], [], []
    for first in range(0, 8 * pictures, pictures):
        chosen = items[first : first + pictures]
        logits, whole = by_hand(model, name, config, chosen)
        right.append(logits.log_softmax(-1).max())
        best.append(int(logits.argmax()))
        shown = [Image.fromarray(item.image) for item in chosen]
        prompt = asked(model, whole, shown)
        if name == "testbed-llava":
            # Theirs make one run.
            prompt["prompt_token_ids"][:1] *= pictures
        prompts.append(prompt)
    found, first, _ = answers(llm, prompts, tokens=1)
    assert [tokens[0] for tokens in found] == best
    # Of pictures with equal cells, a rounding may decide which of two is kept.
    assert (first - torch.stack(right)).abs().sort().values[:-1].max() < 1e-4


@pytest.mark.parametrize("name", ["testbed-llava", "testbed-qwen"])
def test_a_compiled_model(folders, served, items, name):
    """vLLM's own way on a GPU: the decoder compiled, for prompts and for each token after them."""
    llm, config = served(name, "divprune", enforce_eager=False)
    model, batches = plain(folders, name), inputs_of(items[:16], name)
    prompts = [
        asked(model, batch["input_ids"][0].tolist(), Image.fromarray(item.image))
        for batch, item in zip(batches, items, strict=False)
    ]
    assert answers(llm, prompts)[0] == reference(model, config, batches)[0]


@pytest.mark.parametrize("method", ["evs", "vispruner"])
def test_videos_of_qwen2_5_vl(folders, served, method):
    """Random films of several sizes: the same tokens and numbers as `vispco.apply`.

    The films are wider than long. After longer ones, transformers and vLLM begin the text at other
    positions, pruned or not.
    """
    llm, config = served("testbed-qwen", method, 0.3, limit_mm_per_prompt={"image": 0, "video": 1})
    model = plain(folders, "testbed-qwen")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folders["testbed-qwen"])
    random, prompts, batches = np.random.default_rng(0), [], []
    for frames, height, width in [(4, 32, 32), (6, 32, 48), (8, 16, 64), (4, 48, 24)]:
        film = random.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        metadata = {
            "fps": 2.0,
            "duration": frames / 2,
            "total_num_frames": frames,
            "frames_indices": list(range(frames)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }
        text = "<|vision_start|><|video_pad|><|vision_end|>what is left of it ?"
        known = {key: x for key, x in metadata.items() if key != "do_sample_frames"}
        batch = processor(
            text=[text],
            videos=[film],
            video_metadata=[known],
            do_sample_frames=False,
            return_tensors="pt",
        )
        batches.append(dict(batch))
        prompts.append(asked(model, batch["input_ids"][0].tolist(), [(film, metadata)], "video"))
    found, first, _ = answers(llm, prompts)
    expected, right = reference(model, config, batches)
    assert found == expected and (first - right).abs().max() < 1e-3


@pytest.mark.parametrize("method", ["divprune", "visionzip"])
def test_qwen3_vl(folders, served, items, method):
    """Features that enter behind the first layers go with their tokens."""
    llm, config = served("qwen3-vl", method, limit_mm_per_prompt={"image": 1})
    model, batches = plain(folders, "qwen3-vl"), inputs_of(items[:16], "testbed-qwen")
    prompts = [
        asked(model, batch["input_ids"][0].tolist(), Image.fromarray(item.image))
        for batch, item in zip(batches, items, strict=False)
    ]
    found, first, _ = answers(llm, prompts)
    expected, right = reference(model, config, batches)
    assert found == expected and (first - right).abs().max() < 1e-3


def test_what_cannot_be_served_is_refused(folders, served, tmp_path, monkeypatch):
    cases = [
        ({"name": "testbed-llava", "method": "fastv"}, "'fastv' cannot rank a picture before"),
        ({"name": "testbed-qwen", "method": "cdpruner"}, "reads the text of the prompt"),
        ({"name": "testbed-qwen", "video_pruning_rate": 0.5}, "--video-pruning-rate"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            served(**options)
    vispco.PruningConfig("evs", [0.5] * 5).save(tmp_path / "five.json")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "five.json"))
    with pytest.raises(ValueError, match="5 keep_ratios, but the model has 8 decoder layers"):
        LLM(str(folders["testbed-llava"]), **SETTINGS)


SETTING = {
    "speculative_config": "speculative decoding",
    "model_config.multimodal_config.video_pruning_rate": "vLLM's own pruning",
    "compilation_config.cudagraph_mm_encoder": "CUDA graphs of the vision tower",
    "compilation_config.compile_mm_encoder": "a vision tower that is compiled",
    "lora_config.enable_tower_connector_lora": "LoRA in the vision tower",
    "parallel_config.pipeline_parallel_size": "pipeline parallelism",
    "parallel_config.tensor_parallel_size": "tensor parallelism",
}
#: Only methods that read the tower mind them.
OF_THE_TOWER = ("compile_mm_encoder", "tensor_parallel_size")


@pytest.mark.parametrize("setting", SETTING)
@pytest.mark.parametrize("method", ["vispruner", "divprune"])
def test_settings_that_pruning_does_not_go_with(tmp_path, monkeypatch, setting, method):
    from vispco.integrations.vllm.checks import Served

    vispco.PruningConfig(method, [0.5]).save(tmp_path / "config.json")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "config.json"))
    names = [*SETTING, "lora_config.rank"]
    settings = SimpleNamespace()
    for path in names:
        *parents, last = path.split(".")
        place = settings
        for parent in parents:
            if not hasattr(place, parent):
                setattr(place, parent, SimpleNamespace())
            place = getattr(place, parent)
        setattr(place, last, 1 if "parallel" in path else None)
    Served.verify_and_update_config(settings)
    *parents, last = setting.split(".")
    place = settings
    for parent in parents:
        place = getattr(place, parent)
    setattr(place, last, 2)
    if method == "divprune" and last in OF_THE_TOWER:
        Served.verify_and_update_config(settings)
        return
    with pytest.raises(ValueError, match=f"pruning does not go with {SETTING[setting]}"):
        Served.verify_and_update_config(settings)


def test_what_is_cached_goes_by_picture_and_configuration(tmp_path, monkeypatch):
    """Whatever the file is called, and wherever the configuration comes from."""
    from vispco.integrations.vllm.models import Counting

    class Processor:
        def _get_mm_hashes(self, inputs):
            return inputs

    def hashes(name, *config, **known):
        vispco.PruningConfig(*config, **known).save(tmp_path / name)
        monkeypatch.setenv(VARIABLE, str(tmp_path / name))
        made = type("Both", (Counting, Processor), {})()
        return made._get_mm_hashes({"image": ["one", "other"], "video": []})

    found = hashes("a.json", "divprune", [0.5])
    assert found["video"] == [] and len(set(found["image"])) == 2
    assert hashes("b.json", "divprune", [0.5], n_visual=576) == found
    others = ("evs", [0.5]), ("divprune", [0.25]), ("random", [0.5], {"seed": 1})
    many = [hashes("c.json", *config) for config in (*others, ("random", [0.5]))]
    assert len({x for each in [found, *many] for x in each["image"]}) == 10


def test_other_models_are_refused(tmp_path, monkeypatch):
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    vispco.PruningConfig("divprune", [0.5]).save(tmp_path / "config.json")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "config.json"))
    register()
    model = SimpleNamespace(architecture="LlamaForCausalLM")
    with pytest.raises(ValueError, match="LlamaForCausalLM is no model that is pruned"):
        MODELS_CONFIG_MAP["LlamaForCausalLM"].verify_and_update_model_config(model)


@pytest.mark.parametrize(
    ("name", "method", "processes"),
    [("testbed-llava", "vispruner", 1), ("testbed-qwen", "vispruner", 1)]
    + [("testbed-llava", "divprune", 2)],
)
def test_vllm_serve(folders, items, tmp_path, name, method, processes):
    """`vllm serve` with 16 requests at a time, through the client of its HTTP interface.

    Also under tensor parallelism, by a method that reads features.
    """
    from openai import OpenAI

    config = vispco.PruningConfig(method, [0.25] * LAYERS[name])
    config.save(tmp_path / "config.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"dtype": "float32", "max-model-len": 200, "max-num-batched-tokens": 48}
    options |= {"block-size": 32, "port": port, "limit-mm-per-prompt": '{"image": 1}'}
    options |= {"tensor-parallel-size": processes}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folders[name]]
    command += ["--enforce-eager", "--enable-prefix-caching", "--enable-chunked-prefill"]
    command += [part for key, x in options.items() for part in (f"--{key}", x)]
    environment = {**os.environ, VARIABLE: str(tmp_path / "config.json")}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    if processes > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(processes)))
    with (
        open(tmp_path / "log", "w") as log,
        subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=log, stderr=log
        ) as server,
    ):
        try:
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            wait_for(client, server, tmp_path / "log")

            def ask(item):
                file = io.BytesIO()
                Image.fromarray(item.image).save(file, "PNG")
                url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
                parts = [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": item.question},
                ]
                reply = client.chat.completions.create(
                    model=str(folders[name]),
                    messages=[{"role": "user", "content": parts}],
                    temperature=0,
                    max_tokens=4,
                )
                return reply.choices[0].message.content.strip(), reply.usage.prompt_tokens

            with ThreadPoolExecutor(16) as pool:
                found = list(pool.map(ask, items))
        finally:
            server.terminate()
    batches = inputs_of(items, name)
    expected, _ = reference(plain(folders, name), config, batches)
    _, processor = testbed.load(name)
    texts = [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in expected]
    assert [text for text, _ in found] == texts
    lengths = [batch["input_ids"].shape[1] - 48 for batch in batches]
    assert [length for _, length in found] == lengths


def test_the_benchmark(tmp_path, monkeypatch):
    """At a tiny size: what it measures is of two servers, one of which prunes."""
    from benchmarks import serving

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    given = "--visual 64 --layers 2 --hidden 128 --vision-hidden 64 --vision-layers 1 --rounds 1"
    given += " --warmup 0 --requests 2 --concurrency 1 2 --new 2 --repeat 1 --keep 0.5"
    assert serving.main([*given.split(), "--output", str(tmp_path / "serving.json")]) == 0
    figures = json.loads((tmp_path / "serving.json").read_text())["figures"]
    assert [row["concurrency"] for row in figures] == [1, 2]
    for row in figures:
        assert row["prompt_tokens"]["full"] - row["prompt_tokens"]["pruned"] == 32
        assert 0 < row["low"] <= row["throughput"] <= row["high"]


def wait_for(client, server, log):
    """Until the server answers."""
    for _ in range(300):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            return client.models.list()
        except Exception:
            time.sleep(2)
    raise TimeoutError(log.read_text()[-3000:])
