"""The shapes in which people have questions: each is read as it is meant, or told in one line."""

import base64
import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from vispco.data import draw, parse, rows
from vispco.data.columns import OTHER_NAMES

ROW = {"image": "a.png", "question": "q", "answer": "a"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Tests run in a folder of their own, with one picture."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save("a.png")
    return tmp_path


def written(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def table(answers, name="q.csv", delimiter=","):
    """A table with these answers."""
    text = io.StringIO()
    out = csv.writer(text, delimiter=delimiter)
    out.writerows([["image", "question", "answer"], *(["a.png", "q", a] for a in answers)])
    return written(name, text.getvalue())


def answers(data, **options):
    return sorted(c.turns[-1][1] for c in draw(data, 100, **options).conversations)


# ---- the file's own words ------------------------------------------------------------------------
WORDS = ["007", "3", "3.0", "3.10", "1e-7", "1E5", "12345678901234567890", "True", "None", "N/A"]
WORDS += ["null", "nan", "NA", "2020-01-02", "1,5", 'say "x"', "two\nlines"]
NUMBERS = ["1e-7", "12345678901234567890", "3.10", "3.0", "1E5", "0.1", "-0", "123456789.123456789"]


@pytest.mark.parametrize("name", ["q.csv", "q.tsv", "folder/train.csv", "folder/train.tsv"])
def test_cells_are_texts(name):
    if "/" in name:
        pytest.importorskip("datasets")
    table(WORDS, name, "\t" if name.endswith("tsv") else ",")
    found = answers(name if "/" not in name else "folder", images=".")
    assert found == sorted(WORDS)


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")), max_size=4))
@settings(max_examples=60)
def test_any_cell_comes_back(found):
    table(found, delimiter="\t")
    assert [row["answer"] for _, row in rows("q.csv")] == found


@pytest.mark.parametrize("name", ["q.jsonl", "q.json", "folder/train.jsonl"])
def test_numbers_of_json_are_answers_as_they_are_written(name):
    items = [json.dumps({**ROW, "answer": 0}).replace("0}", words + "}") for words in NUMBERS]
    text = "\n".join(items) if name.endswith("l") else f"[{','.join(items)}]"
    if "/" in name:
        pytest.importorskip("datasets")
    written(name, text)
    assert answers(name if "/" not in name else "folder", images=".") == sorted(NUMBERS)


def test_numbers_of_parquet_are_the_shortest_that_mean_the_same():
    datasets = pytest.importorskip("datasets")
    kinds = {"float32": [0.1, 3.25], "float64": [0.1, 1e-7], "int64": [7, 12], "string": ["007"]}
    for kind, values in kinds.items():
        columns = {"image": "string", "question": "string", "answer": kind}
        features = datasets.Features({k: datasets.Value(v) for k, v in columns.items()})
        held = {"image": ["a.png"] * len(values), "question": ["q"] * len(values), "answer": values}
        made = datasets.Dataset.from_dict(held, features=features)
        made.to_parquet("q.parquet")
        made.save_to_disk("saved")
        want = sorted(str(value) for value in values)
        assert answers("q.parquet") == answers("saved", images=".") == want


def test_numbers_deep_in_parquet_are_the_shortest_too():
    pa = pytest.importorskip("pyarrow")
    said = pa.struct([("answer", pa.float32()), ("by", pa.string())])
    kinds = {"answer": pa.list_(said), "also": pa.list_(pa.float16())}
    schema = pa.schema([*((key, pa.string()) for key in ("image", "question")), *kinds.items()])
    held = {**ROW, "answer": [{"answer": 0.1, "by": None}], "also": [np.float16(0.1), None]}
    pa.parquet = pytest.importorskip("pyarrow.parquet")
    pa.parquet.write_table(pa.Table.from_pylist([held], schema), "q.parquet")
    assert answers("q.parquet") == ["0.1"]
    assert next(rows("q.parquet"))[1]["also"] == ["0.1", None]


def test_a_missing_value_is_told_as_missing():
    table(["3", "", "12"])
    with pytest.raises(ValueError, match=r"q\.csv:3: .* 'answer', but its value is missing: ''"):
        draw("q.csv", 1)
    written("q.csv", "image,question,answer\na.png,q\n")
    with pytest.raises(ValueError, match=r"q\.csv:2: .* 'answer', but its value is missing: None"):
        draw("q.csv", 1)


#: What the library reads of JSON: of these values the words are known, or they are not.
KNOWN = {'"3.10"': "3.10", "7": "7", '["3.10", "a", "3.10"]': "3.10", "[7, 7, 8]": "7"}
UNKNOWN = ["3.10", "1e5", "12345678901234567890", '"2020-01-02"', "[3.10]", '[3.10, "a"]']
UNKNOWN = dict.fromkeys([*UNKNOWN, '[{"answer": 3.10, "confidence": 0.5}]'], "give the CSV")


#: Of a truth value and of what is missing, the message says that.
UNKNOWN |= {"true": "write the words of the answer", "null": "its value is missing"}


def by_library(kind, text):
    """The table that the library makes of a file of this kind, as `save_to_disk` writes it."""
    datasets = pytest.importorskip("datasets")
    files = written("given.txt", text)
    table = datasets.load_dataset(kind, data_files=files, split="train", cache_dir="cache")
    table.save_to_disk("saved")
    return table


@pytest.mark.parametrize("value", [*KNOWN, *UNKNOWN])
def test_words_of_json_that_the_library_has_not_kept_are_refused(value):
    """Only where they are an answer: other columns may hold what they like."""
    others = '"image": "a.png", "question": "q", "score": 0.5, "day": "2020-01-02"'
    by_library("json", f'{{{others}, "answer": {value}}}')
    if value in KNOWN:
        assert answers("saved", images=".") == [KNOWN[value]]
        return
    with pytest.raises(ValueError, match=rf"saved\[0\]: .* 'answer'.* {UNKNOWN[value]}") as told:
        draw("saved", 1, images=".")
    assert "\n" not in str(told.value)


def test_words_of_csv_that_the_library_has_not_kept_are_refused(monkeypatch):
    for answer, told in {"007": "got 7, which", "True": "got True, which", "3.10": "3.1,"}.items():
        table = by_library("csv", f"image,question,answer,id\na.png,q,{answer},007\n")
        with monkeypatch.context() as patched:
            patched.setattr("datasets.load_dataset", lambda *_, table=table, **__: table)
            for data in ("saved", "owner/name"):
                with pytest.raises(ValueError, match=told):
                    draw(data, 1, images=".")
    by_library("csv", "image,question,answer,id\na.png,q,x,007\n")
    assert answers("saved", images=".") == ["x"]


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ([3, "3", 4.5], "3"),
        (["a", "b", "b"], "b"),
        ([{"answer": "net", "confidence": 1}, {"answer": "nets"}, {"answer": "net"}], "net"),
    ],
)
def test_of_several_answers_the_most_frequent_counts(given, want):
    assert parse({**ROW, "answer": given}, "q").turns[0][1] == want


# ---- files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("key", ["data", "annotations", "questions"])
def test_a_list_in_an_object(key):
    around = {"version": {"a": [1, {"b": 2}]}, key: [ROW, {**ROW, "answer": "b"}], "end": [1]}
    for indent in (None, 1):
        written("q.json", json.dumps(around, indent=indent))
        found = list(rows("q.json"))
        assert [row["answer"] for _, row in found] == ["a", "b"]
        line = json.dumps(around, indent=indent).splitlines()[
            int(found[1][0].split(":")[1][:2]) - 1
        ]
        assert line.strip().startswith("{")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"data": [{"a": 1}', "expected , or ], got the end of the file"),
        ('{"data": [{"a": 1}]', "expected the end of an object around a list"),
        ('{"data": [{"a": 1}], "test": [{"a": 1}]}', "expected one list of questions, got others"),
        ('{\n"stuff": [{"a": 1}]}', "or one object with a list under data, rows, questions"),
        ('{"data": 3}', None),
    ],
)
def test_an_object_around_a_list_is_checked(text, expected):
    written("q.json", text)
    if expected is None:
        assert [row for _, row in rows("q.json")] == [{"data": 3}]
        return
    with pytest.raises(ValueError, match=r"^q\.json:?1?: ") as error:
        list(rows("q.json"))
    assert expected in str(error.value)


def test_text_in_utf_16_and_packed_by_gzip():
    lines = "".join(json.dumps({**ROW, "answer": a}, ensure_ascii=False) + "\n" for a in "é漢")
    for name, content in (
        ("q.jsonl", lines.encode("utf-16")),
        ("q.jsonl", lines.encode("utf-8-sig")),
        ("q.jsonl.gz", gzip.compress(lines.encode())),
        ("q.gz", gzip.compress(lines.encode("utf-16"))),
    ):
        assert answers(written(name, content)) == ["é", "漢"]
    cells = Path(table(["é"], delimiter="\t")).read_text()
    # Some programs leave the byte order mark out.
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        assert answers(written("q.csv", cells.encode(encoding))) == ["é"]
        assert answers(written("q.json", f"[{json.dumps(ROW)}]".encode(encoding))) == ["a"]
    assert answers(written("q.csv.gz", gzip.compress(cells.encode()))) == ["é"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("q.csv", "image,answer\na.png,caf\xe9".encode("latin-1"), "got the byte 0xe9; save it as"),
        ("q.csv", b"PK\x03\x04" + bytes(9), "a zip archive (or a spreadsheet: save it as CSV)"),
        ("q.jsonl.bz2", b"BZh9" + bytes(9), "a file that is packed by bzip2"),
        ("q.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:20], "expected a file packed by gzip"),
        ("q.gz", gzip.compress(b"PAR1" + bytes(9), mtime=0), "expected parquet as it is, but"),
        ("q.csv", "image".encode("utf-32"), "a file that is in UTF-32"),
        ("q.arrow", b"ARROW1" + bytes(9), "Arrow's: save it as parquet"),
        ("q.xls", b"\xd0\xcf\x11\xe0" + bytes(9), "a spreadsheet: save it as CSV"),
        ("q.csv", b'image,answer\na.png,"x\n', "q.csv:2: expected a row of a table, but"),
        ("q.csv", b"image,answer\na.png,x,y\n", "q.csv:2: expected 2 cells, one for each column"),
        ("q.csv", b"image,image\na.png,x\n", "expected each column once, got 'image' twice"),
        ("q.parquet", b"PAR1" + bytes(50), "q.parquet[0]: no parquet can be read there"),
        ("none.csv", None, "none.csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line(name, content, expected):
    if content is not None:
        written(name, content)
    with pytest.raises((ValueError, OSError)) as error:
        draw(name, 1)
    assert expected in str(error.value) and len(str(error.value)) < 400


def test_a_folder_of_pictures_with_its_metadata():
    pytest.importorskip("datasets")
    for split, answer in (("train", "007"), ("test", "3.10")):
        written(f"imgs/{split}/metadata.csv", f"file_name,question,answer\n0.png,q,{answer}\n")
        Image.new("RGB", (8, 8)).save(f"imgs/{split}/0.png")
        (found,) = draw("imgs", 5, split=split).conversations
        assert found.turns == (("<image>q", answer),)
        assert found.media == (str(Path(f"imgs/{split}/0.png").resolve()),)
    with pytest.raises(ValueError, match="imgs has no split 'dev': expected one of train, test"):
        draw("imgs", 5, split="dev")


# ---- messages ------------------------------------------------------------------------------------
TEXT, YES = {"type": "text", "text": "What?"}, {"role": "assistant", "content": "yes"}


def asked(*parts, **more):
    return {"messages": [{"role": "user", "content": list(parts)}, YES], **more}


INSIDE = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    ("row", "question", "media"),
    [
        (asked({"type": "image"}, TEXT, image="a.png"), "<image>What?", ("/d/a.png",)),
        (asked(TEXT, {"type": "image", "text": None}, images=["a.png"]), "What?<image>", None),
        (asked({"type": "image", "image": "a.png"}, TEXT), "<image>What?", ("/d/a.png",)),
        (asked({"type": "image", "path": "a.png"}, TEXT), "<image>What?", ("/d/a.png",)),
        (
            asked({"type": "image_url", "image_url": {"url": INSIDE}}, TEXT),
            "<image>What?",
            (b"\x89PNG\r\n\x1a\n",),
        ),
        (asked({"type": "image", "image": {"bytes": b"x", "path": None}}, TEXT), None, (b"x",)),
        (
            asked({"type": "image", "image": "a.png"}, TEXT, {"type": "image", "image": "b.png"}),
            "<image>What?<image>",
            ("/d/a.png", "/d/b.png"),
        ),
        (asked({"type": "input_image", "image_url": INSIDE}, TEXT), None, (b"\x89PNG\r\n\x1a\n",)),
        (
            asked({"type": "image", "source": {"type": "base64", "data": INSIDE[22:]}}, TEXT),
            None,
            (b"\x89PNG\r\n\x1a\n",),
        ),
        (asked({"image": "file:///d/a.png"}, {"text": "What?"}), None, ("/d/a.png",)),
        (
            {"images": ["a.png"], "conversations": [{"user": "What?", "assistant": "yes"}]},
            None,
            ("/d/a.png",),
        ),
        (
            {
                "image": "a.png",
                "messages": [
                    {"role": "User", "content": "What?"},
                    {"role": "bot", "content": "yes"},
                ],
            },
            None,
            ("/d/a.png",),
        ),
        (asked({"type": "video", "video": "f.mp4"}, TEXT), "<video>What?", ("/d/f.mp4",)),
        (asked({"type": "video"}, TEXT, video=["a.png"], fps=2), "<video>What?", None),
        (
            {"messages": json.dumps(asked({"type": "image", "image": "a.png"}, TEXT)["messages"])},
            None,
            ("/d/a.png",),
        ),
        (asked(TEXT, image="a.png"), "<image>What?", None),
        ({"conversations": json.dumps(asked(TEXT)["messages"]), "image": "a.png"}, None, None),
    ],
)
def test_messages(row, question, media):
    found = parse(row, "q", "/d")
    assert found.turns == ((question or "<image>What?", "yes"),)
    assert media is None or found.media == media
    assert found.fps == row.get("fps")


def test_frames_in_a_part_may_say_their_rate():
    for said in ({"sample_fps": "4", "fps": 1}, {"fps": 4.0}):
        row = asked({"type": "video", "video": ["a.png"] * 2, **said}, TEXT)
        assert parse(row, "q").fps == 4 and parse({**row, "fps": 2}, "q").fps == 2


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (asked({"type": "image"}, TEXT, {"type": "image"}, image="a.png"), "got it 2 times"),
        (asked({"type": "image", "image": "b.png"}, TEXT, image="a.png"), "in the turns, got both"),
        (asked({"type": "audio", "audio": "x"}, TEXT, image="a.png"), "messages[0].content[0]: "),
        (asked({"type": "image", "image": "https://a.org/b.png"}), "nothing is downloaded"),
        (
            asked({"type": "image", "image": "b.png"}, {"type": "video", "video": "a.mp4"}, TEXT),
            "got several kinds",
        ),
        ({"messages": "no JSON", "image": "a.png"}, "expected a list of turns under 'messages'"),
        ({**ROW, "fps": 0}, "expected a positive number under 'fps', got 0"),
        ({**ROW, "fps": "often"}, "expected a positive number under 'fps', got 'often'"),
    ],
)
def test_messages_that_will_not_do(row, expected):
    with pytest.raises(ValueError, match="^q: ") as error:
        parse(row, "q", "/d")
    assert expected in str(error.value)


# ---- mixed files ---------------------------------------------------------------------------------
BROKEN = [
    [{"from": "gpt", "value": "Hi."}, {"from": "human", "value": "a"}],
    [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}],
    [{"from": "user", "value": "a"}, {"from": "bing", "value": "b"}],
    [{"from": "human", "value": "<image> in a text"}],
    [],
    "none",
    [3],
]


@pytest.mark.parametrize("said", BROKEN)
@pytest.mark.parametrize("more", [{}, {"image": None}, {"image": ""}, {"images": []}])
def test_what_is_left_out_is_not_checked(said, more):
    good = {"image": "a.png", "conversations": [{"from": "human", "value": "q"}]}
    good["conversations"].append({"from": "gpt", "value": "a"})
    written("q.json", json.dumps([good, {"id": 1, "conversations": said, **more}, good]))
    sample = draw("q.json", 9)
    assert (sample.total, sample.skipped) == (2, 1)


def test_questions_without_a_picture_are_left_out_too():
    written("q.csv", "image,question,answer\na.png,q,a\n,q,\n,,\n")
    sample = draw("q.csv", 9)
    assert (sample.total, sample.skipped) == (1, 2)


def test_questions_without_the_key_of_a_picture_are_left_out_of_a_mixed_file():
    alone = {"question": "q", "answer": "", "source": "text"}
    for others in ([alone, ROW], [ROW, alone]):
        written("q.jsonl", "".join(json.dumps(row) + "\n" for row in others))
        assert (draw("q.jsonl", 9).total, draw("q.jsonl", 9).skipped) == (1, 1)
    # Where no row has one, that is what is wrong; and so is a picture by another name.
    named = {**alone, "img": "a.png"}
    for others, expected in (
        ([alone, alone], "jsonl:1: .* 'answer', 'source'"),
        ([ROW, named], ":2"),
    ):
        written("q.jsonl", "".join(json.dumps(row) + "\n" for row in others))
        with pytest.raises(ValueError, match=expected):
            draw("q.jsonl", 9)


def test_a_table_of_the_library_gives_as_many_as_are_asked_for():
    datasets = pytest.importorskip("datasets")
    mixed = [ROW, {**ROW, "image": None}, {**ROW, "image": None}] * 10
    datasets.Dataset.from_list(mixed).save_to_disk("mixed")
    sample = draw("mixed", 10, images=".")
    assert len(sample.conversations) == 10 and sample.skipped <= 20
    assert draw("mixed", 5, 1, images=".") == draw("mixed", 5, 1, images=".")


def test_what_a_model_says_before_the_first_question_is_left_out():
    said = [("gpt", "Hi."), ("human", "q"), ("gpt", "a")]
    row = {"image": "a.png", "conversations": [{"from": w, "value": v} for w, v in said]}
    assert parse(row, "q").turns == (("<image>q", "a"),)


# ---- pictures in the row -------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
def test_pictures_in_base64(kind):
    file = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(file, kind)
    words = base64.b64encode(file.getvalue()).decode()
    lines = "\n".join(words[i : i + 76] for i in range(0, len(words), 76))
    safe, inside = (
        base64.urlsafe_b64encode(file.getvalue()).decode(),
        f"image/{kind};base64,{words}",
    )
    forms = [words, lines, safe, f"data:{inside}", f"DATA:{inside.replace('base64', 'BASE64')}"]
    for image in (*forms, *({name: words} for name in ("bytes", "url", "base64", "data"))):
        assert parse({**ROW, "image": image}, "q").media == (file.getvalue(),)
    # A table may hold long cells.
    assert len(draw(table(["a"] * 2), 9).conversations) == 2
    written("q.csv", f"image,question,answer\n{words},q,a\n")
    assert draw("q.csv", 1).conversations[0].media == (file.getvalue(),)


def test_a_list_of_pictures_in_a_cell():
    written("q.csv", 'images,question,answer\n"[""a.png"", ""a.png""]",q,a\n')
    assert [Path(file).name for file in draw("q.csv", 1).conversations[0].media] == ["a.png"] * 2
    written("[a.png", Path("a.png").read_bytes())
    assert parse({**ROW, "image": "[a.png"}, "q").media == (str(Path("[a.png").resolve()),)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("x" * 700, "expected a path under 'image' (or a picture in base64), got 700 characters"),
        ("iVBORw0KGgo!!", "expected a picture in base64 under 'image', but"),
        ("data:image/png,abc", "expected base64 in the data URL under 'image'"),
        ("s3://bucket/a.png", "nothing is downloaded"),
    ],
)
def test_what_is_neither_a_path_nor_a_picture_is_told_briefly(given, expected):
    with pytest.raises(ValueError, match=r"^q: ") as error:
        parse({**ROW, "image": given}, "q")
    assert expected in str(error.value) and len(str(error.value)) < 250


# ---- other names ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"img": "a.png", "query": "q", "label": "a"}, "image=img,question=query,answer=label"),
        ({"image": "a.png", "Query": "q", "label": "a"}, "question=Query,answer=label"),
        ({"image": "a.png", "question": "q", "gold": "a"}, "answer=gold"),
        (
            {"photo": "a.png", "dialog": asked(TEXT)["messages"]},
            "image=photo,conversations=dialog",
        ),
        ({"image_path": "a.png", **asked(TEXT)}, "image=image_path"),
        (
            {"IMAGE": "a.png", "Question": "q", "ANSWER": "a"},
            "image=IMAGE,question=Question,answer=ANSWER",
        ),
        ({"images": ["a.png"], "texts": [{"user": "q", "assistant": "a"}]}, "conversations=texts"),
    ],
)
def test_the_columns_that_would_work_are_named(row, columns):
    with pytest.raises(ValueError) as error:
        parse(row, "q")
    assert str(error.value).endswith(f"--columns {columns}")
    assert parse(row, "q", columns=dict(pair.split("=") for pair in columns.split(",")))


def test_a_column_may_be_read_as_another_kind():
    row = {**ROW, "image": ["a.png", "a.png"], "video": "a b", "task": "t"}
    found = parse(row, "q", "/d", columns={"images": "image", "system": "video", "task": "answer"})
    assert (len(found.media), found.kind, found.system, found.task) == (2, "image", "a b", "a")


def test_columns_that_would_not_work_are_not_named():
    said = asked(TEXT)["messages"]
    with pytest.raises(ValueError, match=r"'prompt', 'completion'; is it .* name\?$"):
        parse({"image": "a.png", "prompt": said[:1], "completion": said[1:]}, "q")


def test_no_name_is_known_for_two_things():
    names = [name for others in OTHER_NAMES.values() for name in others]
    assert len(names) == len(set(names))
