"""Damaged and hostile files.

Each is told by a clear error that names it, or read right; never anything else.

Thousands of mutations of every kind of file that the library reads, drawn by seed. By default 5,000
where that takes seconds, and fewer of the others. `python -m pytest -m slow tests/test_hostile.py`
makes 5,000 of each, of other seeds.
"""

import pytest
import torch

from hostile_readers import READERS
from mutations import harmless, mutations, within

torch.set_num_threads(1)
QUICK = {
    "messages in an object": 1500,
    "a table": 1500,
    "packed questions": 1000,
    "a parquet file": 1000,
    "a video": 300,
    "a data set on disk": 200,
    "a chat template": 2000,
    "a training state": 1000,
    "a model folder": 20,
    "a shipped checkpoint": 10,
}
CASES = [(name, QUICK.get(name, 5000), 0) for name in READERS]
CASES += [pytest.param(name, 5000, 1, marks=pytest.mark.slow) for name in READERS]


@pytest.mark.parametrize(("name", "count", "seed"), CASES, ids=lambda v: str(v).replace(" ", "-"))
def test_a_damaged_file_is_told_by_name_or_read_right(name, count, seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = READERS[name]
    if hasattr(reader, "needs"):
        pytest.importorskip(reader.needs)
    seeds = reader.seeds()
    joined = reader.join if isinstance(seeds[0], list) else None
    told = right = 0
    with harmless():
        for content in mutations(seeds, count, seed, joined):
            reader.write(content)
            try:
                with within(10):
                    reader.read()
                right += 1
            except (ValueError, OSError) as error:
                told += 1
                text = str(error)
                assert reader.file.split("/")[0] in text or reader.file in str(
                    getattr(error, "filename", "")
                ), (text, content[:500])
                assert len(text) < 1500, text
            except Exception as error:
                pytest.fail(f"{type(error).__name__}: {error}; of {content[:2000]!r}")
    # Neither all refused nor nothing noticed.
    assert told > count / 20 and right > count / 200 and told + right == count
