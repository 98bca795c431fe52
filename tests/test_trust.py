"""What comes from elsewhere is data, never code.

Nothing is unpickled or evaluated, and no path leads out of its folder.
"""

import ast
import json
import os
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import vispco
from mutations import harmless, within
from tests.reproduction.training.build import build_processor
from vispco import PruningConfig, testbed
from vispco.commands.main import main
from vispco.data import draw, open_picture, parse
from vispco.data.pictures import open_video

torch.set_num_threads(1)
ROOT = Path(vispco.__file__).parent.parent

# ---- the source code -----------------------------------------------------------------------------
#: Whoever imports one of these can run code that a file holds. `multiprocessing`, in
#: `tests.reproduction`, pickles as well, but only what our own processes send each other; no file
#: is read by it.
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "joblib",
    "cloudpickle",
    "jsonpickle",
    "code",
    "runpy",
}
NAMES = {
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package",
    "numpy.load",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.UnsafeLoader",
    "yaml.Loader",
    "os.system",
    "os.popen",
    "eval",
    "exec",
    "compile",
    "__import__",
    "builtins.eval",
    "builtins.exec",
}
OPTIONS = {
    "allow_pickle": True,
    "weights_only": False,
    "shell": True,
    "trust_remote_code": True,
    "use_safetensors": False,
}


def dangers(source):
    """What in a program could run code that it reads."""
    tree, known, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                alias.asname or alias.name.split(".")[0]: alias.name
                if alias.asname
                else alias.name.split(".")[0]
                for alias in node.names
            }
            found |= {
                alias.name
                for alias in node.names
                if alias.name.split(".")[0] in MODULES or alias.name in NAMES
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
            found |= {node.module} if node.module.split(".")[0] in MODULES else set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            first, _, rest = ast.unparse(node).partition(".")
            name = known.get(first, first) + (f".{rest}" if rest else "")
            found |= {name} & NAMES
        elif (
            isinstance(node, ast.keyword)
            and isinstance(node.value, ast.Constant)
            and node.arg in OPTIONS
            and node.value.value is OPTIONS[node.arg]
        ):
            found.add(node.arg)
    return found


@pytest.mark.parametrize(
    "path",
    sorted(
        p.relative_to(ROOT).as_posix()
        for folder in ("vispco", "benchmarks")
        for p in (ROOT / folder).rglob("*.py")
    ),
)
def test_nothing_that_is_read_is_run(path):
    assert not dangers((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import marshal, os",
        "import torch; torch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load",
        "from torch import load as read\nread('x')",
        "import numpy as np\nnp.load('x')",
        "f(x, allow_pickle=True)",
        "f(x, weights_only=False)",
        "import yaml\nyaml.load(x)",
        "from yaml import UnsafeLoader\nUnsafeLoader",
        "eval('1')",
        "x = exec",
        "import os\nos.system('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import joblib.numpy_pickle",
        "M.from_pretrained(n, trust_remote_code=True)",
        "__import__('x')",
        "import shelve",
        "from dill import *",
    ],
)
def test_the_search_for_dangers_finds_them(line):
    # Harmless until it is used.
    assert dangers(line) or line == "from torch import load"


# ---- models with code of their own ---------------------------------------------------------------
CODE = """
from pathlib import Path
Path({mark!r}).write_text("this code ran")
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor


class Config(LlavaConfig):
    model_type = "mine"


class Model(LlavaForConditionalGeneration):
    config_class = Config


class Processor(LlavaProcessor):
    pass


def generate(*args, **options):
    raise SystemExit
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """make(model, processor): a folder whose model or whose processor brings code.

    The code writes the file `ran`.
    """
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    PruningConfig("strided", [0.5] * 8).save("c.json")

    def make(model, processor):
        testbed.load("testbed-llava")[0].save_pretrained("model")
        build_processor().save_pretrained("model")
        for name, auto in (
            ("config.json", model),
            ("processor_config.json", processor),
            ("tokenizer_config.json", {}),
        ):
            held = json.loads(Path("model", name).read_text())
            Path("model", name).write_text(json.dumps({**held, **auto}))
        for place in ("model/mine.py", "model/custom_generate/generate.py"):
            Path(place).parent.mkdir(exist_ok=True)
            Path(place).write_text(CODE.format(mark=str(tmp_path / "ran")))

    return make


ASK = [
    "apply",
    "--model",
    "model",
    "--config",
    "c.json",
    "--repeats",
    "0",
    "--device",
    "cpu",
    "--max-new-tokens",
    "2",
]
MODEL = {
    "model_type": "mine",
    "auto_map": {"AutoConfig": "mine.Config", "AutoModelForImageTextToText": "mine.Model"},
}
PROCESSOR = {"processor_class": "Processor", "auto_map": {"AutoProcessor": "mine.Processor"}}


def test_a_models_own_code_runs_only_if_the_user_says_so(own_code, capsys):
    own_code(MODEL, {})
    capsys.readouterr()
    with harmless():
        assert main(ASK) == 2
    assert not Path("ran").exists()
    out, err = capsys.readouterr()
    assert "with --trust-remote-code it may" in err and err.count("\n") == 1 and not out
    # With this option it runs: so the folder did bring code.
    main([*ASK, "--trust-remote-code"])
    assert Path("ran").read_text() == "this code ran"


def test_a_processors_own_code_does_not_run_either(own_code, capsys):
    """Nor the code of a folder `custom_generate`.

    Of a model that is known without it, its code is left alone.
    """
    own_code({}, PROCESSOR)
    main(ASK)
    assert not Path("ran").exists() and "Traceback" not in capsys.readouterr().err
    main([*ASK, "--trust-remote-code"])
    assert Path("ran").exists()


def test_a_folder_of_data_runs_no_script(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/data.py").write_text(CODE.format(mark=str(tmp_path / "ran")))
    with pytest.raises(ValueError, match="data: no data set could be loaded"):
        draw("data", 1)
    assert not Path("ran").exists()


# ---- paths ---------------------------------------------------------------------------------------
@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of pictures with links and worse in it.

    Beside it is a picture that is none of its business.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    # Its name begins like the other's.
    (tmp_path / "in-too").mkdir()
    for name in ("in/a.png", "secret.png", "in-too/b.png"):
        Image.new("RGB", (4, 4), "red").save(name)
    os.symlink(tmp_path / "secret.png", "in/link.png")
    os.symlink(tmp_path, "in/up")
    os.symlink("../secret.png", "in/relative.png")
    os.symlink("/dev/zero", "in/zero.png")
    os.symlink("loop.png", "in/loop.png")
    os.symlink("a.png", "in/fine.png")
    os.mkfifo("in/pipe.png")
    (tmp_path / "in/folder.png").mkdir()
    return tmp_path


OUTSIDE = [
    "../secret.png",
    "../in-too/b.png",
    "sub/../../secret.png",
    "./.././secret.png",
    "/etc/passwd",
    "//etc/passwd",
    "link.png",
    "up/secret.png",
    "relative.png",
    "zero.png",
    "loop.png",
    "pipe.png",
    "folder.png",
    ".",
    "",
    "..",
    "up/in/../secret.png",
    "..\\secret.png",
    "..\\..\\secret.png",
    "C:\\Windows\\win.ini",
    "\\\\host\\share\\a.png",
    "file:///etc/passwd",
    "file:secret.png",
    "file://localhost/a.png",
    "http://127.0.0.1/a.png",
    "https://example.org/a.png",
    "ftp://a/b.png",
    "s3://bucket/a.png",
    "data:image/png;base64,AAAA",
    "a.png\0.txt",
    "\ud800.png",
    "~/a.png",
    "$HOME/a.png",
    "a.png\n",
    "x" * 5000,
    "a/" * 3000,
    None,
    7,
    True,
    {"path": "../secret.png"},
    {"path": None, "bytes": None},
    {"bytes": "AAAA", "path": "/etc/passwd"},
    ["a.png", "../secret.png"],
    [["a.png"]],
    [None],
]


@pytest.mark.parametrize("images", ["in", None], ids=["--images", "the file's folder"])
@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: repr(p)[:40])
def test_no_picture_is_read_from_outside_of_its_folder(path, images, pictures, monkeypatch):
    """Nor a device, a pipe, or an address, by whichever name; a fault is told in a moment."""
    file = pictures / ("q.jsonl" if images else "in/q.jsonl")
    file.write_text(json.dumps({"image": path, "question": "q", "answer": "a"}) + "\n")
    # Without any, the row is left out.
    told = r"q\.jsonl holds no question about a picture" if path in ("", None) else r"q\.jsonl:1: "
    with harmless(), within(2), pytest.raises(ValueError, match=told) as error:
        draw(file, 1, images=images)
    assert len(str(error.value)) < 900


@pytest.mark.parametrize(
    "path", [p for p in OUTSIDE if isinstance(p, str)], ids=lambda p: repr(p)[:40]
)
def test_no_frame_of_a_video_is_read_from_outside_either(path, pictures):
    rows = [
        {"video": path, "question": "q", "answer": "a"},
        {"video": ["a.png", path], "question": "q", "answer": "a"},
    ]
    # A folder is a fine place for frames, but here without any.
    for row in rows[path in (".", "folder.png", "") :]:
        with harmless(), within(2), pytest.raises((ValueError, OSError, ImportError)):
            conversation = parse(row, "q.jsonl:1", "in")
            open_video(conversation.media[0], conversation.folder)


@pytest.mark.parametrize(
    "path", ["a.png", "./a.png", "fine.png", "sub/../a.png", {"path": "a.png"}]
)
def test_a_picture_inside_is_read(path, pictures):
    Path("in/sub").mkdir()
    Path("q.jsonl").write_text(json.dumps({"image": path, "question": "q", "answer": "a"}))
    (conversation,) = draw("q.jsonl", 1, images="in").conversations
    assert open_picture(conversation.media[0], conversation.folder).size == (4, 4)


def test_a_picture_that_becomes_a_link_later_is_refused(pictures):
    """Checked again when it is opened, long after it was drawn."""
    conversation = parse({"image": "a.png", "question": "q", "answer": "a"}, "q:1", "in")
    os.replace("in/link.png", "in/a.png")
    with pytest.raises(ValueError, match="is a link to a place outside"):
        open_picture(conversation.media[0], conversation.folder)


# ---- what pictures and videos may be -------------------------------------------------------------
def test_formats_that_start_programs_are_not_opened(tmp_path, monkeypatch):
    """PIL hands EPS to Ghostscript; and whatever else it can open is not looked at."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(ran) (w) file\n%%EOF\n"
    for name, content in {
        "a.eps": eps,
        "a.png": eps,
        "b.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }.items():
        (tmp_path / name).write_bytes(content)
        with harmless(), pytest.raises(ValueError, match=f"{name}: expected a picture"):
            open_picture(str(tmp_path / name))


def test_a_playlist_does_not_lead_a_video_elsewhere(tmp_path, monkeypatch):
    pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    Path("p.ts").write_bytes(b"G" * 188 * 5)
    lists = {
        "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
        "concat.mp4": "ffconcat version 1.0\nfile {}\n",
        "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    }
    for name, text in lists.items():
        for target in ("/etc/passwd", "p.ts", "http://127.0.0.1:9/a.ts"):
            Path(name).write_text(text.replace("{}", target))
            start = time.monotonic()
            with (
                harmless(),
                within(5),
                pytest.raises(ValueError, match=f"{name}: expected a video"),
            ):
                open_video(name)
            assert time.monotonic() - start < 60


def test_a_file_has_no_more_bytes_than_its_pixels_can_need(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "ab") as file:
        # A sparse file.
        file.truncate(2**24 + 8 * 100 + 1)
    with (
        harmless(50),
        pytest.raises(
            ValueError,
            match=r"a\.png: expected at most 16,778,016 bytes for 100 pixels.*raise --max-pixels",
        ),
    ):
        open_picture(str(tmp_path / "a.png"), max_pixels=100)
    with pytest.raises(ValueError, match="a picture of 16,778,017 bytes: expected at most"):
        open_picture((tmp_path / "a.png").read_bytes(), max_pixels=100)
    assert open_picture(str(tmp_path / "a.png"), max_pixels=1000).size == (4, 4)


@pytest.mark.filterwarnings("error")
def test_a_large_picture_is_told_once_whatever_pil_would_warn_of(tmp_path, capfd):
    """PIL warns from 89 million pixels on, and refuses twice as many: both are one fault here."""
    from test_data import bomb

    for side, words in (
        (9000, "50,000,000 pixels, got 9000 x 9000"),
        (10_000, "got 10000 x 10000"),
        (20_000, "more than PIL would ever open"),
    ):
        with harmless(50), pytest.raises(ValueError, match=words):
            open_picture(bomb(side, side))
    # This picture is no more than a header.
    with pytest.raises(ValueError, match="expected a picture"):
        open_picture(bomb(10_000, 10), max_pixels=10**9)
    assert capfd.readouterr() == ("", "")


def test_a_text_that_unpacks_to_gigabytes_is_refused(tmp_path):
    import zlib

    from test_data import bomb

    packed = zlib.compress(b"\0" * 200_000_000, 1)
    part = b"zTXt" + b"a\0\0" + packed
    chunk = (len(part) - 4).to_bytes(4, "big") + part + zlib.crc32(part).to_bytes(4, "big")
    whole = bomb(4, 4)
    with harmless(100), within(5), pytest.raises(ValueError, match="expected a picture"):
        open_picture(whole[:33] + chunk + whole[33:])


# ---- long files ----------------------------------------------------------------------------------
def test_a_line_without_end_is_not_read_to_its_end(tmp_path):
    with open(tmp_path / "q.jsonl", "wb") as file:
        file.write(b'{"a": "')
        # Sparse: half a gigabyte of zeros.
        file.truncate(2**29)
    with (
        harmless(200),
        within(10),
        pytest.raises(
            ValueError, match=r"q\.jsonl:1: expected at most 16,777,216 characters on a line"
        ),
    ):
        draw(tmp_path / "q.jsonl", 1)


def test_a_configuration_without_end_is_not_read_to_its_end(tmp_path):
    with open(tmp_path / "c.json", "wb") as file:
        file.truncate(2**29)
    with (
        harmless(300),
        within(10),
        pytest.raises(ValueError, match=r"c\.json: expected at most 33,554,432 characters"),
    ):
        PruningConfig.load(tmp_path / "c.json")


def test_many_small_objects_after_a_large_one_take_no_longer_than_their_number(tmp_path):
    """The text that is read ahead is not copied for each of them."""
    (tmp_path / "q.json").write_text('[{"a": "' + "x" * 6_000_000 + '"}' + ", {}" * 50_000 + "]")
    with within(5):
        assert sum(1 for _ in vispco_rows(tmp_path / "q.json")) == 50_001


def vispco_rows(path):
    """`vispco.data.rows`."""
    from vispco.data import rows

    return rows(path)
