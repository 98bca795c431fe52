"""Everything that the library reads from a disk.

Valid examples of each kind of file, and what is done with a file of that kind.
"""

import argparse
import base64
import contextlib
import csv
import gzip
import io
import json
import random
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from gguf_writer import document, f32, q4_1, q8_0
from tests.reproduction.report import CHECK, load
from tests.reproduction.training import build
from tests.reproduction.training.curriculum import Curriculum
from vispco import Frontier, FrontierPoint, LatencyTable, PruningConfig, testbed
from vispco.commands.evaluate import with_metrics
from vispco.commands.model import find_model
from vispco.commands.notations import NOTATIONS, write_notation
from vispco.commands.plot import load_frontier
from vispco.commands.questions import reading_options, testbed_kind
from vispco.data import draw, open_picture, parse
from vispco.data.pictures import open_video
from vispco.data.template import render
from vispco.flops import Dimensions
from vispco.plot.page import _configurations, _settings
from vispco.plot.read import KINDS
from vispco.testbed import gguf, model as testbed_model
from vispco.utils.console import budget_text, flops, percent
from vispco.utils.digest import key
from vispco.utils.files import read_json

ROW = {"image": "a.png", "question": "What is it?", "answer": "a cat"}
# As `--max-pixels`.
PIXELS = 10_000


class Reader:
    """A kind of file.

    seeds(): valid files, as bytes or JSON values.
    read(path): all that is done with one. It may raise ValueError or OSError.
    """

    file = "file.json"

    def write(self, content):
        # The last one may still be mapped.
        Path(self.file).unlink(missing_ok=True)
        Path(self.file).write_bytes(content)

    def join(self, rows):
        raise NotImplementedError


class Saved(Reader):
    """A file that we write too: what can be read can be written, and is the same again."""

    def read(self):
        found = self.kind.load(self.file)
        found.save("again.json")
        assert self.kind.load("again.json") == found
        self.use(found)


class Config(Saved):
    kind = PruningConfig

    def seeds(self):
        some = (
            {"seed": 3},
            {},
            {"adaptive": 13.5, "recycle": 0.3},
            {"contextual": 0.3},
            {"important": 0.3, "step": 2},
            {"visual": 3, "text": 2},
        )
        names = ("random", "fastv", "sparsevlm", "visionzip", "vispruner", "dart")
        budgets = (0.4, "1.8TFLOPs", {"flops": 0.5, "kv_cache": "40%"}, None, 1e12, 1)
        return [
            PruningConfig(name, [1, 1, 0.5, 0.25], options, "llava", budget, 1e12, 576).to_dict()
            for name, options, budget in zip(names, some, budgets, strict=True)
        ]

    def use(self, config):
        assert config.describe() and len(config.tokens(576)) == config.num_layers
        for name in NOTATIONS:
            with contextlib.suppress(ValueError):
                write_notation(name, config)


class Curve(Saved):
    kind = Frontier

    def seeds(self):
        points = [
            FrontierPoint(
                PruningConfig("fastv", (1, s, s / 2), n_visual=576),
                b,
                1e9 * s,
                s,
                1 - s,
                {
                    "accuracy": 0.5 + s / 3,
                    "interval": [0.4, 0.9],
                    "kl": 0.1,
                    "n": 8,
                    "tasks": {"a": 0.5},
                },
            )
            for b, s in ((0.3, 0.3), ("1.2 GFLOPs", 0.7), ({"flops": 0.5}, 0.5))
        ]
        others = [
            {
                "kind": kind,
                "label": "x",
                "share": 0.4,
                "flops": 4e8,
                "accuracy": 0.6,
                "kl": 0.3,
                "budget": 0.5,
            }
            for kind in KINDS
        ]
        meta = {
            "method": "fastv",
            "kernel": "monotone",
            "seed": 0,
            "objective": "kl",
            "model": "m",
            "data": "d",
            "versions": {"torch": "2"},
            "full_accuracy": 0.9,
            "floor_accuracy": 0.2,
            "floor_kl": 3,
            "floor": "blind",
            "label": "x",
            "steps": 5,
            "competitors": others,
        }
        curves = Frontier(points, meta), Frontier(points[:1], {"seed": 1})
        return [
            {"schema_version": 1, "meta": f.meta, "points": [p.to_dict() for p in f.points]}
            for f in curves
        ]

    def use(self, curve):
        """All that `plot`, `evaluate` and the report compute, short of drawing."""
        for point in curve.points:
            assert budget_text(point.budget) and flops(point.flops) and percent(point.share)
        assert _configurations(curve) and _settings(curve.meta)
        row = {"name": "x", "accuracy": 1.0, "share": 1.0, "flops": 1.0, "kl": 0.0}
        with_metrics(curve, [row] * (len(curve) + 2)).save("measured.json")
        Frontier.load("measured.json")
        with contextlib.suppress(ValueError):
            curve.at(0.5)
        assert load_frontier(self.file) == curve


class Table(Saved):
    kind = LatencyTable

    def seeds(self):
        sizes = Dimensions(2, 8, 2, 2, 4, 16, 10)
        return [
            LatencyTable(sizes, (10, 20, 40), (1e-3, 3e-3, 4e-3), {"device": "cpu"}).to_dict(),
            LatencyTable(sizes, (1, 700), (1e-3, 2)).to_dict(),
        ]

    def use(self, table):
        assert bool((table.layer(torch.tensor([1, 15, 100])) > 0).all()) and bool(
            table.full(3, 4) > 0
        )


class Questions(Reader):
    file = "q.jsonl"

    def seeds(self):
        Image.new("RGB", (8, 8), "red").save("a.png")
        return [
            [
                ROW,
                {**ROW, "answer": ["a", "b", "b"], "task": "t", "system": "s"},
                {
                    "images": ["a.png", "./a.png"],
                    "question": "Is <image> like <image>?",
                    "answer": 3,
                },
                {"video": ["a.png", "a.png"], "question": "q", "answer": "a"},
            ]
        ]

    def join(self, rows):
        return b"\n".join(rows) + b"\n"

    def read(self):
        for conversation in draw(self.file, 10, max_pixels=PIXELS).conversations:
            assert conversation.turns and conversation.media
            here = Path(".").resolve()
            assert all(
                Path(m).resolve().is_relative_to(here)
                for m in np.ravel(conversation.media)
                if isinstance(m, str)
            )


class Instruct(Questions):
    file = "q.json"

    def seeds(self):
        super().seeds()

        def talk(*said):
            return {
                "id": "1",
                "image": "a.png",
                "conversations": [
                    {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)
                ],
            }

        text_only = {
            "id": "2",
            "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
        }
        opened = talk("a", "b")
        opened["conversations"].insert(0, {"role": "system", "content": "Be brief."})
        return [[talk("<image>\nWhat?", "A cat."), talk("a", "b", "c", "d"), text_only, opened]]

    def join(self, rows):
        return b"[" + b",\n".join(rows) + b"]"


class Messages(Instruct):
    """Hugging Face's messages, with pictures in the parts, in a list that lies in an object."""

    file = "m.json"

    def seeds(self):
        super().seeds()
        inside = "data:image/png;base64," + base64.b64encode(Path("a.png").read_bytes()).decode()

        def asked(*parts, **more):
            question = {"role": "user", "content": list(parts)}
            return {"messages": [question, {"role": "assistant", "content": "yes"}], **more}

        text = {"type": "text", "text": "What?"}
        return [
            [
                asked({"type": "image"}, text, images=["a.png"]),
                asked(
                    {"type": "image", "image": "a.png"}, text, {"type": "image", "path": "a.png"}
                ),
                asked(text, {"type": "image_url", "image_url": {"url": inside}}),
                asked({"type": "video"}, text, video=["a.png"], fps=0.5),
                asked({"type": "input_image", "image_url": inside}, {"text": "What?"}),
                asked({"type": "image", "source": {"data": inside.split(",")[1]}}, text),
                asked({"image": "file://a.png"}, {"type": "input_text", "text": "What?"}),
                {"images": ["a.png"], "conversations": [{"user": "x", "assistant": "y"}]},
                {"question": "no picture", "answer": 1},
                {"messages": json.dumps(asked(text)["messages"]), "image": inside.split(",")[1]},
            ]
        ]

    def join(self, rows):
        return b'{"about": 1, "data": [' + b",\n".join(rows) + b"]}"


class Cells(Questions):
    """A table: CSV, with quotes and a picture in base64."""

    file = "q.csv"

    def seeds(self):
        super().seeds()
        inside = base64.b64encode(Path("a.png").read_bytes()).decode()
        rows = [("image", "question", "answer"), ("a.png", 'Is "x, y" it?', "007")]
        rows += [(inside, "Two\nlines?", "None"), ("", "no picture", "")]
        file = io.StringIO()
        csv.writer(file).writerows(rows)
        text = file.getvalue()
        listed = text.replace("image,", "images,", 1).replace("a.png", '"[""a.png""]"', 1)
        coded = [text.encode(coding) for coding in ("utf-8", "utf-16", "utf-16-be")]
        return [*coded, text.replace(",", ";").encode(), listed.encode()]


class Packed(Questions):
    """Questions packed by gzip."""

    file = "q.jsonl.gz"

    def seeds(self):
        (rows,) = super().seeds()
        lines = self.join([json.dumps(row).encode() for row in rows])
        return [gzip.compress(lines, mtime=0)]


class Parquet(Questions):
    file = "q.parquet"
    needs = "datasets"

    def seeds(self):
        import datasets

        super().seeds()
        datasets.Dataset.from_list([ROW, {**ROW, "answer": "no"}] * 2).to_parquet(self.file)
        return [Path(self.file).read_bytes()]


class Picture(Reader):
    file = "picture"

    def seeds(self):
        noise = Image.frombytes("RGB", (12, 9), random.Random(0).randbytes(12 * 9 * 3))
        turned = Image.Exif()
        turned[0x112], turned[0x10E] = 6, "text"
        more = {"save_all": True, "append_images": [Image.new("RGB", (12, 9))] * 2}
        kinds = [
            ("png", {}),
            ("png", {"exif": turned}),
            ("jpeg", {}),
            ("jpeg", {"exif": turned, "progressive": True}),
            ("gif", {}),
            ("gif", more),
            ("webp", {"lossless": True}),
            ("webp", more),
            ("bmp", {}),
            ("tiff", {}),
            ("ppm", {}),
            ("tiff", {"exif": turned}),
        ]
        files = [(noise, *kind) for kind in kinds]
        files += [
            (
                Image.new(mode, (9, 7), 1 if len(mode) < 2 or mode == "I;16" else (1,) * len(mode)),
                "png",
                {},
            )
            for mode in ("P", "L", "LA", "RGBA", "1", "I;16")
        ]
        files += [
            (Image.new("P", (9, 7), 1), "png", {"transparency": 1}),
            (Image.new("P", (9, 7), 1), "gif", {"transparency": 1}),
            (Image.new("L", (9, 7), 1), "png", {"transparency": 1}),
            (Image.new("F", (9, 7), 1), "tiff", {}),
            (Image.new("I;16", (9, 7), 1), "tiff", {}),
        ]
        small = bytearray(encoded(Image.new("P", (9, 7), 1), "gif", {}))
        # The canvas is wider than its first frame.
        small[6] = 20
        return [*(encoded(*each) for each in files), bytes(small)]

    def read(self):
        picture = open_picture(self.file, ".", PIXELS)
        assert picture.mode == "RGB" and 0 < picture.width * picture.height <= PIXELS


def encoded(picture, kind, options):
    """A picture as bytes."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


class Film(Reader):
    file = "film.mp4"
    needs = "av"

    def seeds(self):
        return [
            self._film(*kind)
            for kind in (
                ("a.mp4", "mpeg4"),
                ("b.avi", "mpeg4"),
                ("c.mkv", "mpeg4"),
                ("d.mpg", "mpeg1video"),
                ("e.gif", "gif"),
            )
        ]

    def _film(self, name, coding):
        import av

        with av.open(name, "w") as file:
            stream = file.add_stream(coding, rate=25)
            stream.width = stream.height = 32
            stream.pix_fmt = "rgb8" if coding == "gif" else "yuv420p"
            for i in range(5):
                file.mux(
                    stream.encode(
                        av.VideoFrame.from_image(Image.new("RGB", (32, 32), (20 * i,) * 3))
                    )
                )
            file.mux(stream.encode())
        return Path(name).read_bytes()

    def read(self):
        film = open_video(str(Path(self.file).resolve()), ".", 4, PIXELS)
        assert all(frame.width * frame.height <= PIXELS for frame in film)
        known = film.metadata()
        assert len(known["frames_indices"]) == len(film) and film.fps is None or film.fps > 0
        assert known["frames_indices"] == sorted(known["frames_indices"])


class Library(Reader):
    """A folder that `save_to_disk` of the datasets library wrote: Arrow and JSON."""

    file = "saved/data-00000-of-00001.arrow"
    needs = "datasets"

    def seeds(self):
        import datasets

        Image.new("RGB", (8, 8), "red").save("a.png")
        datasets.Dataset.from_list([{**ROW, "image": "a.png"}] * 3).save_to_disk("saved")
        return [Path(self.file).read_bytes()]

    def read(self):
        draw("saved", 3, images=".", max_pixels=PIXELS)


class Template(Reader):
    file = "chat.jinja"

    def seeds(self):
        self._processor = build.build_processor("testbed-qwen")
        return [
            self._processor.chat_template.encode(),
            b"{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}",
        ]

    def read(self):
        options = reading_options(
            argparse.Namespace(chat_template=self.file, max_pixels=1, frames=1, fps=None)
        )
        try:
            render(self._processor, parse(ROW, self.file), options["chat_template"])
        except ValueError as error:
            assert self.file in str(error)
            raise


class Words(Reader):
    """The tokenizer of a model folder.

    By it, `--data testbed` knows whether the model speaks the words of the testbed.
    """

    file = "model/tokenizer.json"

    def seeds(self):
        Path("model").mkdir(exist_ok=True)
        folders = [testbed_model.FOLDER / name for name in testbed_model.EMBEDDED]
        return [json.loads((folder / "tokenizer.json").read_text()) for folder in folders]

    def read(self):
        try:
            assert testbed_kind("model") in testbed.MODELS
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error


class State(Reader):
    """The state that training the testbed goes on from: safetensors and JSON."""

    file = "state/state.json"

    def seeds(self):
        from tests.reproduction.training.state import save_state

        module, optims = self._parts()
        module(torch.ones(1, 3)).sum().backward()
        optims[0].step()
        save_state(
            Path("state"),
            5,
            {"model": module},
            optims,
            Curriculum(),
            [{"step": 5, "tasks": {"easy_vqa": 0.5}}],
        )
        tensors, state = sorted(Path("state").iterdir())
        self._tensors, self._state = tensors.read_bytes(), json.loads(state.read_text())
        return [self._tensors, self._state]

    def _parts(self):
        module = nn.Linear(3, 2)
        return module, [torch.optim.AdamW(module.parameters())]

    def write(self, content):
        """Damaged tensors have the right checksum: whoever forges them can forge that too."""
        for path in Path("state").iterdir():
            path.unlink()
        of_json = content.lstrip()[:1] in (b"{", b"[") and b'"curriculum' in content
        tensors = self._tensors if of_json else content
        check = f"{zlib.crc32(tensors):08x}"
        Path("state", f"{check}.safetensors").write_bytes(tensors)
        Path("state", "state.json").write_bytes(
            content if of_json else json.dumps({**self._state, "tensors": check}).encode()
        )

    def read(self):
        from tests.reproduction.training.state import load_state

        module, optims = self._parts()
        step, log = load_state(Path("state"), {"model": module}, optims, Curriculum())
        assert step >= 0 and isinstance(log, list)
        module(torch.ones(1, 3)).sum().backward()
        optims[0].step()


class Model(Reader):
    """A model folder: weights, sizes, processor and words, by `--model FOLDER`."""

    folder = "model"
    file = "model"

    def seeds(self):
        from tiny import make

        make("llava").save_pretrained(self.folder)
        build.build_processor().save_pretrained(self.folder)
        names = (
            "model.safetensors",
            "config.json",
            "tokenizer.json",
            "processor_config.json",
            "generation_config.json",
            "tokenizer_config.json",
        )
        self._whole = {
            name: Path(self.folder, name).read_bytes()
            for name in names
            if Path(self.folder, name).exists()
        }
        return [name.encode() + b"\0" + content for name, content in self._whole.items()]

    def write(self, content):
        name, _, content = content.partition(b"\0")
        self._last = name = (
            name.decode(errors="replace")
            if name.decode(errors="replace") in self._whole
            else "config.json"
        )
        for each, whole in self._whole.items():
            Path(self.folder, each).write_bytes(content if each == name else whole)

    def read(self):
        options = {"device": "cpu", "dtype": "auto", "trust_remote_code": False}
        find_model(argparse.Namespace(model=self.folder, **options))()


class Shipped(Model):
    """A testbed model's own folder, damaged."""

    file = "testbed-llava"
    folder = "testbed-llava"

    def seeds(self):
        build.build_model(0).save_pretrained(self.folder)
        build.build_processor().save_pretrained(self.folder)
        self._whole = {path.name: path.read_bytes() for path in Path(self.folder).iterdir()}
        return [name.encode() + b"\0" + content for name, content in self._whole.items()]

    def read(self):
        before, testbed_model.FOLDER = testbed_model.FOLDER, Path(".").resolve()
        try:
            testbed_model.load("testbed-llava")
        finally:
            testbed_model.FOLDER = before


class Weights(Reader):
    """A GGUF file: the reader trusts none, though users' files are only read if their hash fits."""

    file = "a.gguf"

    def seeds(self):
        rng = np.random.default_rng(0)
        entries = [("a", 1), ("b", 0.5), ("c", True), ("d", "x"), ("e", ["y", "z"]), ("f", [3, 1])]
        tensors = [f32("one", np.ones((2, 3))), q8_0(rng, "two", 2, 32)[0]]
        tensors.append(q4_1(rng, "three", 1, 32)[0])
        return [document(entries, tensors), document(entries, []), document([], tensors)]

    def read(self):
        for name, packed in gguf.read(self.file).tensors.items():
            try:
                weights = packed.unpack()
            except ValueError as error:
                raise ValueError(f"{self.file}: {error}") from error
            assert packed.name == name and weights.shape == packed.shape
            assert bool(weights.isfinite().all()) and weights.numel() < 2**10


class Anything(Reader):
    """What every other JSON file of ours is read by."""

    def seeds(self):
        return [{"schema_version": 1, "a": [1, 2.5, {"b": None}], "c": "x"}]

    def read(self):
        read_json(self.file, lambda data: json.dumps(data, indent=2, allow_nan=False))


class Result(Reader):
    """What a claim of the reproduction came to: it is what was measured, or it is refused."""

    file = "cost.json"

    def seeds(self):
        self._made = {
            "schema_version": 1,
            "claim": "cost",
            "verdict": "missed",
            "rows": [{"budget": 0.1, "ours": 2.5}, {"budget": 0.3, "ours": None}],
        }
        return [{**self._made, CHECK: key(**self._made)}]

    def read(self):
        assert load(Path("."))["cost"] == self._made


READERS = {
    "a configuration": Config(),
    "a frontier": Curve(),
    "a latency table": Table(),
    "JSON": Anything(),
    "JSON lines of questions": Questions(),
    "LLaVA-Instruct JSON": Instruct(),
    "messages in an object": Messages(),
    "a table": Cells(),
    "packed questions": Packed(),
    "a parquet file": Parquet(),
    "a picture": Picture(),
    "a video": Film(),
    "a data set on disk": Library(),
    "a chat template": Template(),
    "a tokenizer": Words(),
    "a training state": State(),
    "a model folder": Model(),
    "a shipped checkpoint": Shipped(),
    "a GGUF file": Weights(),
    "a result of the reproduction": Result(),
}
