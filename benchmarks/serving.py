"""What pruning gives a server of vLLM: throughput with and without it, side by side.

Two servers run, one with a configuration that keeps a share of each picture's tokens. They are sent
the same requests in turns, a number of them at a time, each with a picture of its own. So nothing
is taken from a cache. The time counts everything between request and answer: reading the picture,
the vision tower, ranking, prefill and decoding. Needs vLLM and its plug-in (docs/serving-vllm.md).

    python -m benchmarks.serving --output serving.json
    python -m benchmarks.serving --device cuda --dtype bfloat16 --hidden 4096 --layers 32
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vispco
from vispco import testbed

from .side_by_side import arguments, run, side_by_side

#: Pixels a side of a patch, and numbers of a head.
PATCH, HEAD = 14, 64


def save_model(folder: Path, options: Any) -> None:
    """A LLaVA with random weights, and the tokenizer of the testbed."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    processor: Any = testbed.load("testbed-llava")[1]
    own: Any = testbed.load("testbed-llava")[0].config
    side = round(options.visual**0.5)
    if side**2 != options.visual:
        raise ValueError(f"--visual must be the square of a whole number, got {options.visual}")
    vision = CLIPVisionConfig(
        hidden_size=options.vision_hidden,
        intermediate_size=4 * options.vision_hidden,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=max(1, options.vision_hidden // HEAD),
        image_size=side * PATCH,
        patch_size=PATCH,
    )
    text = own.text_config.to_dict() | {
        "hidden_size": options.hidden,
        "intermediate_size": 11 * options.hidden // 4,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // HEAD,
        "num_key_value_heads": options.hidden // HEAD,
        "head_dim": HEAD,
        "max_position_embeddings": 4096,
    }
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=own.image_token_index,
        image_seq_length=options.visual,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).to(getattr(torch, options.dtype))
    names = {
        # vLLM 0.32 knows the names of older releases of transformers.
        name.replace("model.vision_tower.", "model.vision_tower.vision_model."): x
        for name, x in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=names)
    square = {"height": side * PATCH, "width": side * PATCH}
    processor.image_processor.size = processor.image_processor.crop_size = square
    processor.patch_size = PATCH
    processor.save_pretrained(folder)


@contextmanager
def server(folder: Path, options: Any, config: Path | None, log: Path) -> Iterator[str]:
    """A server of the model in `folder`: its address. config: of pruning; None: none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--dtype", options.dtype, "--port", str(port), "--max-model-len", "4096"]
    command += ["--limit-mm-per-prompt", '{"image": 1}']
    command += ["--enforce-eager"] if options.device == "cpu" else []
    environment = {**os.environ, "VISPCO_CONFIG": str(config or "")}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    address = f"http://127.0.0.1:{port}"
    with (
        open(log, "w") as written,
        subprocess.Popen(command, env=environment, stdout=written, stderr=written) as process,
    ):
        try:
            for _ in range(300):
                if process.poll() is not None:
                    break
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5)
                    yield address
                    return
                except OSError:
                    time.sleep(2)
            raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
        finally:
            process.terminate()


def request(folder: Path, options: Any, picture: np.ndarray) -> bytes:
    """A question about a picture, as vLLM's HTTP interface reads it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what is left of it ? " * options.repeat},
    ]
    asked = {
        "model": str(folder),
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": options.new,
        "ignore_eos": True,
    }
    return json.dumps(asked).encode()


def answer(address: str, body: bytes) -> dict:
    """What the server answers."""
    headers = {"Content-Type": "application/json"}
    url = f"{address}/v1/chat/completions"
    with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as reply:
        return json.load(reply)


def measure(options) -> list[dict]:
    """Throughput over that of the server that does not prune, by requests at a time."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "this benchmark needs vLLM, in an environment of its own: docs/serving-vllm.md"
        )
    random, figures = np.random.default_rng(options.seed), []
    side = round(options.visual**0.5) * PATCH
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder, config = root / "model", root / "config.json"
        save_model(folder, options)
        vispco.PruningConfig(options.method, [options.keep] * options.layers).save(config)
        addresses = {
            name: stack.enter_context(server(folder, options, file, root / f"{name}.log"))
            for name, file in (("full", None), ("pruned", config))
        }
        for concurrency in options.concurrency:
            number = max(concurrency, options.requests)
            pool = stack.enter_context(ThreadPoolExecutor(concurrency))
            bodies = [
                [
                    request(folder, options, random.integers(0, 256, (side, side, 3), np.uint8))
                    for _ in range(number)
                ]
                for _ in range(options.warmup + options.rounds)
            ]
            left = {name: iter(bodies) for name in addresses}
            prompts: dict[str, int] = {}

            def ask(name: str, left=left, pool=pool, prompts=prompts) -> None:
                found = pool.map(partial(answer, addresses[name]), next(left[name]))
                prompts[name] = [each["usage"]["prompt_tokens"] for each in found][0]

            calls = {name: partial(ask, name) for name in addresses}
            timing = {"rounds": options.rounds, "warmup": options.warmup}
            times = side_by_side(calls, baseline="full", **timing)["pruned"]
            row = {
                "concurrency": concurrency,
                "requests": number,
                "n_visual": options.visual,
                "keep": options.keep,
                "method": options.method,
                "layers": options.layers,
                "hidden": options.hidden,
                "new_tokens": options.new,
                "vllm": importlib.metadata.version("vllm"),
                "prompt_tokens": prompts,
                "throughput": 1 / times["ratio"],
                "low": 1 / times["high"],
                "high": 1 / times["low"],
            }
            figures.append(row)
            print(
                f"{concurrency:>3} at a time: {row['throughput']:.2f} times the throughput "
                f"({row['low']:.2f} to {row['high']:.2f}), prompts of {prompts['pruned']} tokens "
                f"for {prompts['full']}"
            )
    return figures


def main(argv=None) -> int:
    """Run the command; returns the exit code."""
    parser = arguments("benchmarks.serving", __doc__, "serving.json")
    add = parser.add_argument
    add("--visual", type=int, default=576, help="visual tokens of a picture")
    add("--keep", type=float, default=0.25, help="share of them that is kept")
    add("--method", default="divprune", help="that ranks them")
    add("--layers", type=int, default=8, help="of the decoder")
    add("--hidden", type=int, default=512, help="hidden size of the decoder")
    add("--vision-layers", type=int, default=4, help="of the vision tower")
    add("--vision-hidden", type=int, default=256, help="hidden size of the vision tower")
    add("--repeat", type=int, default=6, help="times that the question is asked, 6 tokens each")
    add("--new", type=int, default=16, help="tokens of each answer")
    add("--concurrency", type=int, nargs="+", default=[1, 16], help="requests at a time")
    add("--requests", type=int, default=8, help="requests of a round, at least")
    return run(parser, measure, argv)


if __name__ == "__main__":
    raise SystemExit(main())
