"""Questions from disk.

What a row may say, reading in a stream, drawing by seed, pictures, video frames.
"""

import io
import json
import math
import os
import random
import struct
import sys
import tracemalloc
import zlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from vispco import data
from vispco.data import draw, lines as lines_module, parse, reservoir, rows
from vispco.data.colours import in_rgb
from vispco.data.film import clock
from vispco.data.pictures import open_picture, open_video

ROW = {"image": "a.png", "question": "What is it?", "answer": "a cat"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Tests run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(path, size=(8, 8), colour="red", **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def write(path, items, **options):
    text = (
        json.dumps(items, **options)
        if options.pop("whole", path.endswith(".json"))
        else "".join(json.dumps(item) + "\n" for item in items)
    )
    Path(path).write_text(text, encoding="utf-8")
    return path


# ---- reading in a stream -------------------------------------------------------------------------
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
    max_leaves=8,
)


@given(
    items=st.lists(st.dictionaries(st.text(max_size=4), values, max_size=3), max_size=5),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
    blank=st.sampled_from(["", " ", "\n\n", "\r\n"]),
)
@settings(max_examples=150)
def test_a_list_read_in_pieces_is_what_json_reads_at_once(items, indent, ascii_only, chunk, blank):
    text = blank + json.dumps(items, indent=indent, ensure_ascii=ascii_only) + blank
    Path("x.json").write_bytes(
        text.encode("utf-8", "surrogatepass") if ascii_only else text.encode()
    )
    before, lines_module._CHUNK = lines_module._CHUNK, chunk
    try:
        found = list(rows("x.json"))
    finally:
        lines_module._CHUNK = before
    assert [row for _, row in found] == items


def test_rows_know_their_lines():
    write("x.json", [{"a": i, "b": [i]} for i in range(3)], indent=1)
    text = Path("x.json").read_text().splitlines()
    for i, (source, row) in enumerate(rows("x.json")):
        name, line = source.split(" ")[0].split(":")
        assert (
            name == "x.json"
            and text[int(line) - 1].strip() == "{"
            and f'"a": {row["a"]},' in text[int(line)]
        )
        assert source.endswith(f"(item {i + 1})")
    Path("x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa9"}')
    assert list(rows("x.jsonl")) == [("x.jsonl:1", {"a": 1}), ("x.jsonl:4", {"a": "é"})]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}\n{"a": \n', "x.jsonl:2: expected a JSON object on one line, got '{\"a\":'"),
        ('{"a": 1}\nhello\n', "x.jsonl:2: expected a JSON object on one line, got 'hello'"),
        ('{"a": 1} {"a": 2}\n', "x.jsonl:1: expected a JSON object on one line"),
        ("[" * 100_000, "x.jsonl:1: expected { or ] in a list of objects"),
        ('{"a":' * 100_000, "x.jsonl:1"),
        ('[{"a":' + '{"a":' * 100_000 + "1" + "}" * 100_000, "too deeply nested"),
        (
            '[\n{"a": 1}\n{"a": 2}]',
            "x.jsonl:3: expected , or ] in a list of objects, got '{\"a\": 2}]'",
        ),
        ('[{"a": 1},]', "x.jsonl:1: expected { in a list of objects, got ']'"),
        ('[{"a": 1}', "x.jsonl:1: expected , or ], got the end of the file"),
        ('[{"a": 1}] more', "expected nothing more"),
        ("[1, 2]", "expected { or ]"),
        (
            '[{"a": 1}, {"b": nope}]',
            "x.jsonl:1 (item 2): expected a JSON object, got '{\"b\": nope}]'",
        ),
        (b"\x89PNG\r\n\x1a\n\xff\xff", "x.jsonl: expected text in UTF-8, got the byte 0x89"),
    ],
)
def test_broken_files_are_told_by_line(text, expected):
    Path("x.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        list(rows("x.jsonl"))
    assert expected in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["big.jsonl", "big.json"])
def test_a_file_never_has_to_fit_in_memory(name):
    picture("a.png")
    write(name, [{**ROW, "other": "x" * 500, "id": i} for i in range(20_000)])
    assert os.path.getsize(name) > 10_000_000
    tracemalloc.start()
    try:
        sample = draw(name, 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sample.total == 20_000 and len(sample.conversations) == 10 and peak < 2_000_000


# ---- what a row may say --------------------------------------------------------------------------
def test_a_question_and_its_pictures():
    one = parse({**ROW, "task": "what", "id": 3}, "q.jsonl:7", "/data")
    assert one == data.Conversation(
        (("<image>What is it?", "a cat"),),
        ("/data/a.png",),
        "image",
        "/data",
        "q.jsonl:7",
        None,
        "what",
    )
    two = parse(
        {"images": ["a.png", "sub/b.png"], "question": "Is <image> like <image>?", "answer": 6},
        "q",
        "/data",
    )
    assert two.turns == (("Is <image> like <image>?", "6"),) and two.media == (
        "/data/a.png",
        "/data/sub/b.png",
    )
    film = parse(
        {"video": ["a.png", "b.png"], "question": "What moves?", "answer": "it"}, "q", "/data"
    )
    assert (
        film.kind == "video"
        and film.turns[0][0] == "<video>What moves?"
        and film.media == (("/data/a.png", "/data/b.png"),)
    )
    assert parse({**ROW, "image": {"bytes": b"x", "path": None}}, "q").media == (b"x",)
    votes = {**ROW, "answer": ["no", "yes", "yes", "no", "maybe"]}
    # Of ties the first.
    assert parse(votes, "q").turns[0][1] == "no"
    renamed = {"img": "a.png", "query": "What?", "label": ["x"]}
    assert parse(
        renamed, "q", columns={"image": "img", "question": "query", "answer": "label"}
    ).turns == (("<image>What?", "x"),)


def said(*texts, **more):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"image": "a.png", "conversations": turns, **more}


def test_llava_instruct_conversations():
    talk = parse(said("<image>\nWhat?", "A cat.", "Where?", "There."), "q", "/data")
    assert talk.turns == (("<image>\nWhat?", "A cat."), ("Where?", "There.")) and talk.media == (
        "/data/a.png",
    )
    unmarked = said("What?", "A cat.", images=["a.png", "b.png"])
    del unmarked["image"]
    assert parse(unmarked, "q").turns[0][0] == "<image><image>What?"
    opened = said("What?", "A cat.")
    opened["conversations"].insert(0, {"role": "system", "content": "Be brief."})
    assert parse(opened, "q").system == "Be brief."
    text_only = said("Hello?", "Hi.")
    del text_only["image"]
    assert parse(text_only, "q") is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([], "expected an object with image, question and answer, got []"),
        ("x" * 1000, "expected an object"),
        ({}, "expected a picture under 'image'"),
        ({"question": "a", "answer": "b"}, "got the keys 'question', 'answer'"),
        (
            {**ROW, "images": ["b.png"]},
            "expected one of image, images and video, got image and images",
        ),
        (
            {"image": "a.png", "answer": "b"},
            "expected a text under 'question', got the keys 'image', 'answer'",
        ),
        (
            {"image": "a.png", "question": "q", "anwser": "b"},
            "expected a text under 'answer', got the keys 'image', 'question', 'anwser'",
        ),
        ({**ROW, "answer": "  "}, "expected a text under 'answer', but its value is missing: '  '"),
        ({**ROW, "answer": None}, "under 'answer', but its value is missing: None"),
        ({**ROW, "answer": math.nan}, "under 'answer', but its value is missing: 'nan'"),
        ({**ROW, "answer": ["a", None]}, "under 'answer', but its value is missing: None"),
        ({**ROW, "answer": True}, "under 'answer', got True"),
        ({**ROW, "answer": []}, "under 'answer', but its value is missing: []"),
        ({**ROW, "answer": {"text": "b"}}, "under 'answer', got {'text': 'b'}"),
        ({**ROW, "question": ["a"]}, "under 'question', got ['a']"),
        ({**ROW, "question": "a\ud800"}, "half of a character (a lone surrogate): 'a\\ud800'"),
        ({**ROW, "task": ["x"]}, "under 'task'"),
        ({**ROW, "image": 7}, "expected a path under 'image', got 7"),
        ({**ROW, "image": ["a.png", None]}, "expected a path under 'image', got None"),
        ({**ROW, "image": "a\0.png"}, "expected a path"),
        ({**ROW, "image": {"path": None, "bytes": None}}, "expected a path"),
        ({**ROW, "image": "https://example.org/a.png"}, "nothing is downloaded"),
        ({**ROW, "image": "../a.png"}, "lies outside of /data"),
        ({**ROW, "image": "sub/../../a.png"}, "lies outside of /data"),
        ({**ROW, "image": "/etc/passwd"}, "give a folder that holds all pictures as --images"),
        ({**ROW, "image": "/database/a.png"}, "lies outside of /data"),
        (
            {**ROW, "question": "Are <image> and <image> alike?"},
            "expected <image> once for each of 1, got it 2 times",
        ),
        ({**ROW, "images": None, "answer": "an <image>"}, "a marker in an answer"),
        ({**ROW, "question": "In <video>?"}, "expected <image> in questions only"),
        (said(), "expected a list of turns under 'conversations'"),
        (said("only a question"), "the last one gpt's, got user"),
        (said("a", "b", "c"), "got user, assistant, user"),
        ({"image": "a.png", "conversations": "hello"}, "expected a list of turns"),
        (
            {"image": "a.png", "conversations": [{"from": "robot", "value": "x"}]},
            "conversations[0]: expected {'from': 'human' or 'gpt'",
        ),
        (
            {"image": "a.png", "conversations": [{"from": ["human"], "value": "x"}]},
            "conversations[0]",
        ),
        (said("a", None), "conversations[1].value"),
    ],
)
def test_a_bad_row_says_where_what_was_expected_and_what_came(row, expected):
    with pytest.raises(ValueError) as error:
        parse(row, "q.jsonl:7", "/data")
    assert (
        str(error.value).startswith("q.jsonl:7: ")
        and expected in str(error.value)
        and len(str(error.value)) < 300
    )


# ---- drawing -------------------------------------------------------------------------------------
def test_a_reservoir_gives_every_item_the_same_chance_at_every_place():
    """Chi-square against uniform over (item, place).

    The 0.1 % point of 19 degrees of freedom is 43.8.
    """
    counts = Counter()
    for seed in range(3000):
        counts.update(enumerate(reservoir(iter(range(20)), 3, seed)))
    for place in range(3):
        assert sum((counts[place, item] - 150) ** 2 / 150 for item in range(20)) < 43.8


def test_a_reservoir_holds_no_more_than_it_gives():
    alive, most = [0], [0]

    class Item:
        def __init__(self):
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    assert len(reservoir((Item() for _ in range(500)), 7)) == 7 and most[0] <= 10


def test_the_same_seed_draws_the_same_questions():
    picture("a.png")
    write("q.jsonl", [{**ROW, "question": f"q{i}"} for i in range(50)])
    first, again, other = (draw("q.jsonl", 10, seed).conversations for seed in (0, 0, 1))
    assert first == again and first != other and len({c.source for c in first}) == 10
    everything = draw("q.jsonl", 1000)
    assert len(everything.conversations) == everything.total == 50


def test_counts_and_order():
    picture("a.png")
    films = [{"video": ["a.png"], "question": "q", "answer": "a"}] * 3
    text_only = {"conversations": said("x", "y")["conversations"]}
    write("q.json", [text_only, *films, *[ROW] * 4, text_only])
    sample = draw("q.json", 100)
    assert (sample.total, sample.skipped) == (7, 2)
    assert [c.kind for c in sample.conversations] == ["image"] * 4 + ["video"] * 3


def test_every_line_is_checked_even_if_it_is_not_drawn():
    picture("a.png")
    write("q.jsonl", [ROW] * 30 + [{"image": "a.png"}])
    with pytest.raises(ValueError, match=r"q\.jsonl:31: expected a text under 'question'"):
        draw("q.jsonl", 1)


def test_pictures_lie_in_one_folder(tmp_path):
    picture("elsewhere/b.png")
    picture("pictures/a.png")
    Path("data").mkdir()
    write("data/q.jsonl", [ROW])
    with pytest.raises(
        ValueError, match=r"q\.jsonl:1: expected the file .*data/a\.png, which is not there"
    ):
        draw("data/q.jsonl", 1)
    assert draw("data/q.jsonl", 1, images="pictures").conversations[0].media == (
        str(tmp_path / "pictures/a.png"),
    )
    write("data/q.jsonl", [{**ROW, "image": str(tmp_path / "pictures/a.png")}])
    # Absolute, and inside.
    assert draw("data/q.jsonl", 1, images="pictures").total == 1
    with pytest.raises(ValueError, match="outside"):
        draw("data/q.jsonl", 1)
    os.symlink(tmp_path / "elsewhere/b.png", "pictures/link.png")
    write("data/q.jsonl", [{**ROW, "image": "link.png"}])
    with pytest.raises(ValueError, match=r"q\.jsonl:1: .*link\.png is a link to a place outside"):
        draw("data/q.jsonl", 1, images="pictures")
    with pytest.raises(ValueError, match="is no folder"):
        draw("data/q.jsonl", 1, images="nowhere")


# ---- pictures ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "colour"),
    [
        ("RGB", (9, 8, 7)),
        ("RGBA", (9, 8, 7, 255)),
        ("L", 9),
        ("P", 3),
        ("1", 1),
        ("CMYK", (0, 9, 9, 9)),
        ("LA", (9, 255)),
    ],
)
def test_every_mode_becomes_rgb(mode, colour):
    Image.new(mode, (4, 6), colour).save("x.tif")
    opened = open_picture("x.tif", ".")
    assert opened.mode == "RGB" and opened.size == (4, 6)
    encoded = io.BytesIO()
    opened.save(encoded, "png")
    assert open_picture(encoded.getvalue()).tobytes() == opened.tobytes()


def test_a_picture_taken_sideways_is_turned():
    exif = Image.Exif()
    # Orientation: turn by 90 degrees.
    exif[0x0112] = 6
    picture("x.jpg", (4, 6), exif=exif)
    assert open_picture("x.jpg").size == (6, 4)


def on_white(rgb, alpha):
    """Composited by hand."""
    share = np.asarray(alpha, float)[..., None] / 255
    return np.rint(np.asarray(rgb) * share + 255 * (1 - share)).astype(int)


@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=15)
def test_what_is_transparent_shows_white_whatever_colour_hides_there(kind, seed):
    rng = np.random.default_rng(seed)
    rgb, alpha = rng.integers(0, 256, (6, 5, 3)), rng.choice([0, 3, 128, 255], (6, 5))
    pixels = np.dstack([rgb, alpha]).astype(np.uint8)
    lossless = {"lossless": True, "exact": True} if kind == "webp" else {}
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **lossless)
    found = np.asarray(open_picture(file.getvalue())).astype(int)
    assert abs(found - on_white(rgb, alpha)).max() <= 1
    assert (found[alpha == 0] == 255).all() and (found == rgb)[alpha == 255].all()


def test_transparency_of_greys_palettes_and_single_colours():
    grey = np.full((2, 2), 40, np.uint8)
    clear = np.array([[0, 255], [0, 255]], np.uint8)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([255, 0, 255, 40, 40, 40] + [0] * 750)
    palette.paste(0, (0, 0, 1, 2))
    deep = np.array([[7, 40 * 257], [7, 40 * 257]], np.uint16)
    few = Image.fromarray(np.dstack([np.where(clear, 40, 9)] * 3).astype(np.uint8))
    for name, image, options in (
        ("la.png", Image.fromarray(np.dstack([grey, clear])), {}),
        ("p.png", palette, {"transparency": 0}),
        ("partly.png", palette, {"transparency": b"\0\xff"}),
        ("p.gif", palette, {"transparency": 0}),
        ("l.png", Image.fromarray(np.where(clear, grey, 9).astype(np.uint8)), {"transparency": 9}),
        ("rgb.png", few, {"transparency": (9, 9, 9)}),
        ("deep.png", Image.fromarray(deep), {"transparency": 7}),
    ):
        image.save(name, **options)
        found = np.asarray(open_picture(name))[0]
        assert found.tolist() == [[255] * 3, [40] * 3], name


@pytest.mark.parametrize("kind, options", [("jpeg", {}), ("png", {"transparency": (9, 9, 9)})])
def test_an_opened_picture_stays_as_it_was(kind, options):
    """Sideways, and with a colour that is transparent."""
    turned, file = Image.Exif(), io.BytesIO()
    turned[0x0112] = 6
    Image.new("RGB", (4, 2), (9, 9, 9)).save(file, kind, exif=turned, **options)
    image, untouched = (Image.open(io.BytesIO(file.getvalue())) for _ in range(2))
    assert in_rgb(image).size == (2, 4)
    assert image.tobytes() == untouched.tobytes() and image.size == (4, 2)
    assert image.info == untouched.info and image.getexif()[0x0112] == 6


def test_where_the_first_frame_of_a_gif_draws_nothing_is_white():
    Image.new("P", (2, 2), 1).save("small.gif", palette=[9, 9, 9, 40, 40, 40])
    held = bytearray(Path("small.gif").read_bytes())
    # The canvas is 4 x 2, and the frame is its right half.
    held[6], place = 4, held.index(b",", 13 + 3 * 2 ** (1 + held[10] % 8))
    held[place + 1] = 2
    found = np.asarray(open_picture(bytes(held)))
    assert found[0].tolist() == [[255] * 3] * 2 + [[40] * 3] * 2


def test_16_bits_keep_their_range():
    values = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    image = Image.fromarray(values)
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, options in (("a.png", {}), ("a.tif", {}), ("a.ppm", {}), ("b.png", {"exif": turned})):
        image.save(name, **options)
        found = np.asarray(open_picture(name))
        assert found[..., 0].ravel().tolist() == [0, 1, 128, 255], name
        assert found.shape[:2] == ((4, 1) if options else (1, 4))
    # 0 is white.
    image.save("white.tif", tiffinfo={262: 0})
    assert np.asarray(open_picture("white.tif"))[0, :, 0].tolist() == [255, 254, 127, 0]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_whose_white_nobody_knows_are_refused(mode):
    Image.new(mode, (4, 4), 1).save("a.tif")
    write("q.jsonl", [{**ROW, "image": "a.tif"}])
    with pytest.raises(ValueError, match=r"q\.jsonl:1: .*a\.tif: expected 8 or 16 bits for each"):
        draw("q.jsonl", 1)


def bomb(width, height):
    """A PNG of that size by its header, with nothing in it."""

    def part(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + part(b"IDAT", b"")
        + part(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            bomb(8000, 8000),
            "expected at most 50,000,000 pixels, got 8000 x 8000; "
            "make it smaller or raise --max-pixels",
        ),
        (bomb(60_000, 60_000), "50,000,000 pixels"),
        (b"hello", "expected a picture, but it is none of PNG, JPEG"),
        (b"", "expected a picture"),
        (b"\x89PNG\r\n\x1a\n", "expected a picture"),
    ],
)
def test_a_bad_picture_is_told_before_anything_is_decoded(content, expected):
    Path("a.png").write_bytes(content)
    write("q.jsonl", [ROW])
    with pytest.raises(ValueError) as error:
        draw("q.jsonl", 1)
    assert str(error.value).startswith("q.jsonl:1: ") and expected in str(error.value)
    with pytest.raises(ValueError, match="pixels|picture"):
        open_picture(content)


def test_a_picture_that_ends_too_early_is_told_when_it_is_opened():
    noise = random.Random(0).randbytes(64 * 64 * 3)
    Image.frombytes("RGB", (64, 64), noise).save("a.png")
    Path("a.png").write_bytes(Path("a.png").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"a\.png: expected a picture, but"):
        open_picture("a.png")


# ---- video frames --------------------------------------------------------------------------------
def greys(frames):
    return [frame.getpixel((0, 0))[0] for frame in frames]


def test_frames_are_spread_evenly():
    for i in range(9):
        picture(f"film/{i}.png", colour=(10 * i,) * 3)
    Path("film/notes.txt").write_text("no frame")
    assert greys(open_video("film", frames=3)) == [0, 40, 80]
    assert greys(open_video("film", frames=100)) == [10 * i for i in range(9)]
    assert greys(open_video(("film/2.png", "film/1.png"), frames=8)) == [20, 10]
    assert greys(open_video("film", frames=1)) == [0]


def test_a_film_without_frames():
    Path("empty").mkdir()
    with pytest.raises(ValueError, match="got no picture in it"):
        open_video("empty")
    with pytest.raises(FileNotFoundError):
        open_video("nothing.mp4")


def test_a_video_file():
    av = pytest.importorskip("av")
    with av.open("film.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for i in range(11):
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (20 * i,) * 3))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    found = greys(open_video("film.mp4", frames=3))
    assert len(found) == 3 and all(
        abs(a - b) < 12 for a, b in zip(found, [0, 100, 200], strict=True)
    )
    with pytest.raises(ValueError, match="at most 100 pixels a frame, got 32 x 32"):
        open_video("film.mp4", max_pixels=100)
    Path("bad.mp4").write_text("hello")
    with pytest.raises(ValueError, match="expected a video"):
        open_video("bad.mp4")


def filmed(name, times, size=(32, 32), left=None):
    """A video whose frames are shown at `times` (seconds). left: the colour of its left half."""
    av = pytest.importorskip("av")
    with av.open(name, "w") as file:
        stream = file.add_stream("mpeg4", rate=30)
        stream.width, stream.height = size
        stream.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(times):
            image = Image.new("RGB", size, (20 * i % 256,) * 3)
            if left:
                image.paste(left, (0, 0, size[0] // 2, size[1]))
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return name


@pytest.mark.parametrize("start", [0, 7.5])
def test_frames_know_when_they_are_shown(start):
    """At a steady rate, by their numbers; at a varying rate, in milliseconds."""
    steady = open_video(filmed("steady.mkv", [start + i / 5 for i in range(300)]), frames=8)
    assert [p / steady.fps for p in steady.places] == pytest.approx(
        [0, 8.6, 17, 25.6, 34.2, 42.8, 51.2, 59.8], abs=2e-3
    )
    assert steady.length / steady.fps == pytest.approx(60, abs=0.01)
    assert steady.sampled_fps == pytest.approx(8 / 60, rel=1e-3)
    times = [0, 0.1, 0.2, 30, 31, 60]
    varying = open_video(filmed("varying.mkv", [start + t for t in times]))
    assert [p / varying.fps for p in varying.places] == pytest.approx(times)
    assert varying.sampled_fps == pytest.approx(5 / 60)
    whole = Path("steady.mkv").read_bytes()
    assert open_video(whole, frames=8).metadata() == steady.metadata()
    known = steady.metadata()
    assert known["total_num_frames"] == steady.length and known["fps"] == steady.fps


@given(
    rate=st.sampled_from([5.0, 24.0, 25.0, 30000 / 1001, 60.0]),
    count=st.integers(1, 60),
    start=st.floats(0, 9),
)
def test_the_clock_of_a_steady_video_counts_its_frames(rate, count, start):
    times = [start + i / rate for i in range(count)]
    assert clock(times, rate) == (rate, count, list(range(count)))
    # The header says nothing, or something else.
    for stated in (None, 1000.0):
        found, length, places = clock(times, stated)
        if count > 1:
            assert [p / found for p in places] == pytest.approx(
                [t - start for t in times], abs=1e-3
            )
            assert length / found == pytest.approx(count / rate, abs=1e-3)
    assert clock([None] * count, rate) == (rate, count, list(range(count)))


def test_frames_in_a_folder_stand_in_the_order_of_their_numbers():
    for i in (1, 2, 10):
        picture(f"film/frame{i}.png", colour=(10 * i,) * 3)
    film = open_video("film", fps=2)
    assert greys(film) == [10, 20, 100] and film.metadata()["duration"] == 1.5
    assert open_video("film").fps is None


def test_a_video_taken_sideways_is_turned():
    """The display matrix says: turn by 90 degrees, clockwise."""
    film = filmed("up.mp4", [0, 1], size=(64, 32), left="red")
    content = bytearray(Path(film).read_bytes())
    place = content.index(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    frames = open_video(bytes(content))
    if not hasattr(pytest.importorskip("av").VideoFrame, "rotation"):
        pytest.skip("this release of PyAV does not read the matrix")
    assert frames[0].size == (32, 64)
    top, bottom = (frames[0].getpixel((16, y)) for y in (8, 56))
    assert top[0] > 200 > 50 > top[1] and max(bottom) < 50


def test_what_is_transparent_in_a_moving_picture_shows_white():
    pytest.importorskip("av")
    frames = [Image.new("RGBA", (16, 16), (255, 0, 255, 0)) for _ in range(3)]
    for i, frame in enumerate(frames):
        frame.paste((0, 0, 0, 255), (4 * i, 4, 4 * i + 4, 12))
    frames[0].save("t.gif", save_all=True, append_images=frames[1:], duration=200, disposal=2)
    film = open_video("t.gif")
    assert [frame.getpixel((15, 15)) for frame in film] == [(255, 255, 255)] * 3
    assert [p / film.fps for p in film.places] == pytest.approx([0, 0.2, 0.4])


def test_without_the_package_that_reads_video(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    Path("film.mp4").write_text("")
    with pytest.raises(ImportError, match=r"vispco\[video\]"):
        open_video("film.mp4")


# ---- the datasets library ------------------------------------------------------------------------
def test_without_the_datasets_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"no file, so it must be the name of a data set.*vispco\[data\]"
    ):
        draw("owner/name", 1)
    # Nor a builder of the library.
    with pytest.raises(ValueError, match="'json' is no file and no folder here"):
        draw("json", 1)
    with pytest.raises(ImportError, match=r"a folder of data.*vispco\[data\]"):
        draw(".", 1)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


def test_a_data_set_never_has_to_fit_in_memory(datasets, monkeypatch):
    """Of 64 pictures of half a megabyte, those drawn are read, each once.

    No more than they need is ever held.
    """
    arrow = pytest.importorskip("pyarrow")
    size = 54 + 400 * 400 * 3

    def rows():
        for i in range(64):
            Image.new("RGB", (400, 400), (i,) * 3).save("one.bmp")
            yield {
                "image": {"bytes": Path("one.bmp").read_bytes(), "path": None},
                "question": f"q{i}",
                "answer": "a",
            }

    datasets.Dataset.from_generator(
        rows,
        features=datasets.Features(
            {
                "image": datasets.Image(decode=False),
                "question": datasets.Value("string"),
                "answer": datasets.Value("string"),
            }
        ),
        writer_batch_size=8,
    ).save_to_disk("saved")
    read, one = [], sys.modules["vispco.data.draw"].row
    monkeypatch.setattr(
        sys.modules["vispco.data.draw"],
        "row",
        lambda table, i, source: read.append(i) or one(table, i, source),
    )
    before = arrow.total_allocated_bytes()
    tracemalloc.start()
    sample = draw("saved", 3)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (
        sample.total == 64
        and len(read) == len(set(read)) == 3
        and [len(c.media[0]) for c in sample.conversations] == [size] * 3
    )
    assert (
        3 * size <= held and peak < 12 * size and arrow.total_allocated_bytes() - before < 8 * size
    )


def test_data_sets_of_the_library(datasets, monkeypatch):
    picture("pictures/a.png", (5, 7))
    encoded = {"bytes": Path("pictures/a.png").read_bytes(), "path": None}
    table = {
        "image": [encoded] * 20,
        "query": [f"q{i}" for i in range(20)],
        "label": [["x", "y", "y"]] * 20,
    }
    names = {"question": "query", "answer": "label"}
    stored = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    stored.save_to_disk("saved")
    datasets.DatasetDict({"val": stored}).save_to_disk("split")
    Path("parquet").mkdir()
    stored.to_parquet("parquet/train.parquet")
    for name, split in (("saved", None), ("split", "val"), ("parquet", None)):
        sample = draw(name, 5, columns=names, split=split)
        assert (len(sample.conversations), sample.total) == (5, 20)
        assert sample.conversations == draw(name, 5, columns=names, split=split).conversations
        for conversation in sample.conversations:
            index = int(conversation.source.split("[")[1][:-1])
            assert conversation.turns == ((f"<image>q{index}", "y"),)
            assert open_picture(conversation.media[0], conversation.folder).size == (5, 7)
    with pytest.raises(
        ValueError, match="split has no split 'train': expected one of val, as --split"
    ):
        draw("split", 5, columns=names)
    with pytest.raises(ValueError, match="parquet: no data set could be loaded"):
        draw("parquet", 5, split="test")
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *words, **options: asked.append((*words, options)) or stored,
    )
    assert (
        draw("owner/name:some", 5, columns=names, split="val").total
        == draw("owner/name", 5, columns=names).total
        == 20
    )
    assert asked == [
        ("owner/name", "some", {"split": "val"}),
        ("owner/name", None, {"split": "train"}),
    ]
    several = datasets.Dataset.from_dict(
        {"images": [["pictures/a.png"] * 2], "question": ["q"], "answer": ["a"]}
    )
    several = several.cast_column("images", datasets.Sequence(datasets.Image()))
    several.save_to_disk("several")
    (found,) = draw("several", 5, images=".").conversations
    assert len(found.media) == 2 and open_picture(found.media[1], found.folder).size == (5, 7)
