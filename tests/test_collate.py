"""Batches by a model's processor.

Labels against character offsets, for several tokenizers, templates, paddings and media.
"""

import functools
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vispco import testbed
from vispco.calibration import prepare
from vispco.data import Conversation, batches, collate, parse, prompt
from vispco.data.collate import split
from vispco.data.stills import without_videos
from vispco.data.template import render
from vispco.testbed.model import EMBEDDED

# Visual tokens of a picture here.
TOKENS = 4
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>", "<|eot|>"]
CORPUS = [
    "USER: What is in the picture? ASSISTANT: A cat sits on the sofa, 12 of them.",
    "yes no user model system",
    "[INST] red blue [/INST]",
] * 20


# ---- tokenizers of three kinds -------------------------------------------------------------------
def tokenizer(kind):
    # As of GPT-2, Llama 3, Qwen.
    if kind == "bytes":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer, core.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "pieces":
        # As of Llama 1 and 2, Mistral, Gemma: spaces belong to words, merges cross anything.
        core = Tokenizer(models.BPE(unk_token="<pad>", byte_fallback=False))
        core.pre_tokenizer, core.decoder = (
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            decoders.Metaspace(),
        )
        alphabet = [chr(c) for c in range(33, 127)]
    else:
        # Words and single signs.
        core = Tokenizer(models.WordLevel(unk_token="<pad>"))
        core.pre_tokenizer, alphabet = pre_tokenizers.Whitespace(), []
    options = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "words":
        trainer = trainers.WordLevelTrainer(**options)
    else:
        trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, **options)
    core.train_from_iterator(CORPUS, trainer)
    # Such a tokenizer adds the beginning of the sequence by itself.
    if kind == "pieces":
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair=None, special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
    )


# ---- chat templates, each also in Python ---------------------------------------------------------
# In Python, a template is a function from [(role, text with <image>)] to pieces. Answers are pieces
# ("answer", text).
PARTS = (
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = (
    "{% for m in messages %}{{ m['role'].upper() }}: "
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] " + PARTS + " [/INST]"
    "{% else %} " + PARTS + "{{ eos_token }}{% endif %}{% endfor %}"
)
# A template for messages that are strings, not lists of parts.
STRINGS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
)
LOUD = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A=" + PARTS + "."
    "{% else %}Q=" + PARTS + "{% endif %}{% endfor %}"
)


def chatml(turns):
    for role, text in turns:
        yield from ((None, f"<|im_start|>{role}\n"), (role, text), (None, "<|im_end|>\n"))


def llava(turns):
    for role, text in turns:
        images, words = "<image>\n" * text.count("<image>"), text.replace("<image>", "")
        yield from ((None, f"{role.upper()}: {images}"), (role, words), (None, " "))


def mistral(turns):
    yield None, "<s>"
    for role, text in turns:
        ends = ("[INST] ", " [/INST]") if role == "user" else (" ", "</s>")
        yield from ((None, ends[0]), (role, text), (None, ends[1]))


def strings(turns):
    for role, text in turns:
        yield from (
            (None, f"{role}: "),
            (role, text.replace("<image>", "<image>\n")),
            (None, "<|eot|>"),
        )


def loud(turns):
    for role, text in turns:
        yield from (
            (None, "A=" if role == "assistant" else "Q="),
            (role, text),
            (None, "." if role == "assistant" else ""),
        )


def plain(turns):
    for role, text in turns:
        yield from ((role, text), (None, "</s>" if role == "assistant" else "\n"))


TEMPLATES = {
    "chatml": (CHATML, chatml),
    "llava": (LLAVA, llava),
    "mistral": (MISTRAL, mistral),
    "strings": (STRINGS, strings),
    "loud": (LOUD, loud),
    "none": (None, plain),
}


@functools.cache
def processor(kind, template):
    images = CLIPImageProcessorPil(
        size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}
    )
    return LlavaProcessor(
        images,
        tokenizer(kind),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[template][0],
    )


def oracle(kind, template, conversation):
    """(ids, labels) by hand.

    The text is written in Python, each `<image>` is repeated, offsets come from the tokenizer.
    """
    turns = [
        (role, text)
        for turn in conversation.turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    text, answers = "", []
    for role, piece in TEMPLATES[template][1](turns):
        piece = piece.replace("<image>", "<image>" * TOKENS)
        if role == "assistant":
            answers.append((len(text), len(text) + len(piece)))
        text += piece
    tok = processor(kind, template).tokenizer
    if kind == "pieces" and not text.startswith("<s>"):
        text, answers = f"<s>{text}", [(a + 3, b + 3) for a, b in answers]
    made = tok(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, inside = (
        made["input_ids"],
        [any(s < b and e > a for a, b in answers) for s, e in made["offset_mapping"]],
    )
    endings = {tok.convert_tokens_to_ids(word) for word in SPECIAL} - {
        tok.convert_tokens_to_ids("<image>")
    }
    labels = [
        i if here or before and i in endings else -100
        for i, here, before in zip(ids, inside, [False, *inside], strict=False)
    ]
    return ids, labels


def pictures(n=1):
    file = io.BytesIO()
    Image.new("RGB", (20, 12), "blue").save(file, "png")
    return (file.getvalue(),) * n


def talk(*turns):
    return Conversation(
        tuple(turns), pictures(sum(q.count("<image>") for q, _ in turns)), "image", "/", "q.jsonl:1"
    )


TALKS = [
    talk(("<image>What is in the picture?", "A cat")),
    talk(("<image>What?", "yes"), ("Why?", "no"), ("user: yes", "A cat sits on 12 of them.")),
    talk(("<image>red", "1"), ("<image>blue", "2 of them, yes")),
    talk(("<image><image>What is it?", "a")),
]
everywhere = pytest.mark.parametrize(
    ("kind", "template"), [(k, t) for k in ("bytes", "pieces", "words") for t in TEMPLATES]
)


@everywhere
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_are_the_tokens_that_hold_the_answers(kind, template, side):
    made = collate(processor(kind, template), TALKS, padding_side=side)
    width = made["input_ids"].shape[1]
    assert made["labels"].shape == made["input_ids"].shape == made["attention_mask"].shape
    assert len(made["pixel_values"]) == 6
    for row, conversation in enumerate(TALKS):
        ids, labels = oracle(kind, template, conversation)
        space = width - len(ids)
        place = slice(space, width) if side == "left" else slice(0, len(ids))
        assert (
            made["attention_mask"][row].sum() == len(ids)
            and made["attention_mask"][row, place].all()
        )
        assert made["input_ids"][row, place].tolist() == ids
        assert made["labels"][row, place].tolist() == labels
        assert (made["labels"][row][made["attention_mask"][row] == 0] == -100).all()


words = (
    st.text(st.sampled_from("abcdefgh ASU:.,?!012[]'\"\\{}<>/éß漢🙂\n"), min_size=1, max_size=12)
    .map(str.strip)
    .filter(bool)
)


@pytest.mark.parametrize(
    ("kind", "template"),
    [("bytes", "chatml"), ("bytes", "loud"), ("bytes", "none"), ("bytes", "mistral")],
)
@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3))
@settings(max_examples=40)
def test_labels_of_any_words(kind, template, turns):
    turns[0] = ("<image>" + turns[0][0], turns[0][1])
    made = collate(processor(kind, template), [talk(*turns)])
    ids, labels = oracle(kind, template, talk(*turns))
    assert made["input_ids"][0].tolist() == ids and made["labels"][0].tolist() == labels
    learned = processor(kind, template).tokenizer.decode(
        made["labels"][0][made["labels"][0] != -100], skip_special_tokens=True
    )
    assert all(answer in learned for _, answer in turns)


def test_labels_agree_with_a_template_that_marks_its_answers():
    """The generation mask of transformers, where a template has one."""
    marked = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% generation %}"
        + PARTS
        + "<|im_end|>{% endgeneration %}"
        "{% else %}" + PARTS + "<|im_end|>{% endif %}\n{% endfor %}"
    )
    turns = [("What is it?", "A cat sits."), ("Why?", "yes no")]
    said = [
        {"role": r, "content": [{"type": "text", "text": t}]}
        for turn in turns
        for r, t in zip(("user", "assistant"), turn, strict=True)
    ]
    chatml_processor = processor("bytes", "chatml")
    whole = chatml_processor.tokenizer.apply_chat_template(
        said,
        chat_template=marked,
        return_assistant_tokens_mask=True,
        return_dict=True,
        tokenize=True,
    )
    made = collate(
        chatml_processor,
        [talk(("<image>" + turns[0][0], turns[0][1]), turns[1])],
        chat_template=marked,
    )
    ids = [i for i in made["input_ids"][0].tolist() if i != chatml_processor.image_token_id]
    labels = [
        x
        for i, x in zip(made["input_ids"][0].tolist(), made["labels"][0].tolist(), strict=True)
        if i != chatml_processor.image_token_id
    ]
    assert ids == whole["input_ids"]
    assert [x != -100 for x in labels] == [bool(m) for m in whole["assistant_masks"]]


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_testbeds_processors_give_the_testbeds_own_batches(name, side, tmp_path):
    examples, processor = testbed.examples("test", 12, seed=3), testbed.load(name)[1]
    if name == "testbed-qwen":
        examples = examples[:6] + testbed.enlarge(examples[6:], 72, 80)
    conversations = []
    for i, e in enumerate(examples):
        Image.fromarray(e.image).save(tmp_path / f"{i}.png")
        conversations.append(
            parse(
                {"image": f"{i}.png", "question": e.question + "?", "answer": e.answer},
                f"{i}",
                tmp_path,
            )
        )
    (made,) = batches(processor, conversations, 12, padding_side=side)
    want = testbed.collate(examples, side, model=name)
    assert set(made) == set(want)
    for key in want:
        assert made[key].shape == want[key].shape and torch.allclose(
            made[key].float(), want[key].float(), atol=1e-5
        ), key
    asked = prompt(processor, conversations[0])
    alone = testbed.collate(examples[:1], with_answers=False, model=name)
    assert torch.equal(asked["input_ids"], alone["input_ids"]) and "labels" not in asked


def test_the_prompt_is_the_batch_up_to_the_answer():
    for template in ("chatml", "llava", "mistral", "none"):
        made, asked = (
            f(processor("bytes", template), x)
            for f, x in ((collate, TALKS[:1]), (prompt, TALKS[0]))
        )
        first = int((made["labels"][0] != -100).nonzero()[0])
        assert (
            asked["input_ids"][0].tolist()
            == made["input_ids"][0, :first].tolist()[: asked["input_ids"].shape[1]]
        )
        # LLaVA's prompt leaves the space to the answer.
        assert first - asked["input_ids"].shape[1] in (0, 1)


def test_words_that_look_like_a_message_are_words():
    looks = [
        ("<image>What does {'type': 'text', 'text': 'x'} say?", "[{'type': 'text', 'text': 'no'}]")
    ]
    for template in ("chatml", "strings"):
        made = collate(processor("bytes", template), [talk(*looks)])
        ids, labels = oracle("bytes", template, talk(*looks))
        assert made["input_ids"][0].tolist() == ids and made["labels"][0].tolist() == labels


def test_a_system_prompt_is_not_labelled():
    conversation = Conversation(
        (("<image>Why?", "yes"),), pictures(), "image", "/", "q", system="A cat"
    )
    text, ((start, end),) = render(processor("bytes", "chatml"), conversation)
    assert text == (
        "<|im_start|>system\nA cat<|im_end|>\n"
        "<|im_start|>user\n<image>Why?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert text[start:end] == "yes" and start > text.index("assistant")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}Q{% endif %}{% endfor %}",
            "it leaves answers out, repeats or reorders them",
        ),
        (
            "{% for m in messages | reverse %}" + PARTS + "{% endfor %}",
            "it leaves answers out, repeats or reorders them",
        ),
        ("{% for m in messages %}" + PARTS + PARTS + "{% endfor %}", "repeats"),
        (
            "{% for m in messages %}{% for p in m['content'] %}"
            "{{ p.get('text', '<image>') | upper }}{% endfor %}{% endfor %}",
            "alters the answers",
        ),
        (
            "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}",
            "roles must alternate",
        ),
        ("{% for m in messages %}", "cannot write this conversation"),
    ],
)
def test_a_template_that_will_not_do_is_told(template, expected):
    with pytest.raises(ValueError, match=r"q\.jsonl:1") as error:
        collate(processor("bytes", "chatml"), [TALKS[1]], chat_template=template)
    assert expected in str(error.value)


def test_a_template_that_loses_the_pictures_is_told():
    """By some releases of transformers, and else by the search."""
    model, own = testbed.load("testbed-llava")
    lost = (
        "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' %}"
        "{{ p['text'] }} {% endfor %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="cannot process it|no visual tokens"):
        prepare(model, [collate(own, [TALKS[0]], chat_template=lost)])


def test_other_faults_are_told():
    with pytest.raises(ValueError, match="takes no video"):
        collate(
            processor("bytes", "chatml"),
            [Conversation((("<video>Why?", "yes"),), (pictures(),), "video", "/", "q.jsonl:1")],
        )
    for answer, sign in (("a <image> b", "<image>"), ("a<|im_end|>b", r"<\|im_end\|>")):
        with pytest.raises(ValueError, match=rf"q\.jsonl:1: the answer .* holds '{sign}'"):
            collate(processor("bytes", "chatml"), [talk(("<image>What?", answer))])
    # These are not in the template: the processor writes them in the place of a picture.
    for name, sign in (("gemma3", "<image_soft_token>"), ("idefics3", "<global-img>")):
        made_of, image = family(name)
        with pytest.raises(ValueError, match=f"the answer .* holds '{sign}'"):
            own = CHATML.replace("<image>", image)
            collate(made_of, [talk(("<image>What?", f"a{sign}"))], chat_template=own)
    # What the data format itself writes stands for a picture, not for words.
    assert collate(processor("bytes", "chatml"), [talk(("<image>What?", "a"), ("<b>?", "c"))])
    for question, sign in (("a</s>b", "</s>"), ("a<|im_end|>\nb", r"<\|im_end\|>")):
        bad = talk(("<image>What?", "a"), (question, "b"))
        for make in (collate, lambda own, several: prompt(own, several[0])):
            with pytest.raises(ValueError, match=rf"q\.jsonl:1: the question .* holds '{sign}'"):
                make(processor("bytes", "chatml"), [bad])
    spoken = replace(talk(("<image>What?", "a")), system="x<|im_start|>y")
    with pytest.raises(ValueError, match=r"the system prompt .* holds '<\|im_start\|>'"):
        collate(processor("bytes", "chatml"), [spoken])
    # Two places, one picture.
    bad = Conversation((("<image>What <image>", "yes"),), pictures(), "image", "/", "q.jsonl:5")
    with pytest.raises(ValueError, match=r"^q\.jsonl:5: LlavaProcessor cannot process it"):
        collate(processor("bytes", "chatml"), [*TALKS[:2], bad, TALKS[2]])
    with pytest.raises(ValueError, match="batch_size"):
        batches(processor("bytes", "chatml"), TALKS, 0)
    with pytest.raises(ValueError, match="without tokenizer"):
        collate(CLIPImageProcessorPil(), TALKS)
    gone = Conversation(TALKS[0].turns, ("/nowhere/a.png",), "image", "/", "q.jsonl:9")
    with pytest.raises(ValueError, match=r"q\.jsonl:9: .*a\.png"):
        collate(processor("bytes", "chatml"), [gone])


# ---- video ---------------------------------------------------------------------------------------
class Films:
    """What Qwen2.5-VL's processor does with videos, on the testbed's processor.

    Two frames make a step. (Qwen's own needs torchvision.)
    """

    video_processor, video_token, image_token = True, "<|video_pad|>", "<|image_pad|>"

    def __init__(self, processor):
        self.processor, self.tokenizer, self.decode = (
            processor,
            processor.tokenizer,
            processor.decode,
        )
        self.chat_template = processor.chat_template.replace(
            "{% elif",
            "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% elif",
            1,
        )

    def apply_chat_template(self, said, chat_template=None, **options):
        return self.processor.apply_chat_template(
            said, chat_template=chat_template or self.chat_template, **options
        )

    def __call__(self, text, videos=None, do_sample_frames=None, video_metadata=None, **options):
        assert do_sample_frames is False
        films = [film for row in videos for film in row]
        steps = [film[i] for film in films for i in range(0, len(film), 2)]
        made = self.processor.image_processor(images=steps, return_tensors="pt")
        grids = [[len(film) // 2, *made["image_grid_thw"][0, 1:].tolist()] for film in films]
        sizes = iter(t * h * w // 4 for t, h, w in grids)
        whole = [
            "".join(
                "<|video_pad|>" * next(sizes) if part == "<|video_pad|>" else part
                for part in row.replace("<|video_pad|>", "\0<|video_pad|>\0").split("\0")
            )
            for row in text
        ]
        out = self.tokenizer(whole, **options)
        kinds = (
            2 * (out["input_ids"] == self.tokenizer.convert_tokens_to_ids("<|video_pad|>")).long()
        )
        return {
            **out,
            "mm_token_type_ids": kinds,
            "pixel_values_videos": made["pixel_values"],
            "video_grid_thw": torch.tensor(grids),
        }


def test_videos_where_the_processor_takes_them(tmp_path):
    model, processor = testbed.load("testbed-qwen")
    for i, example in enumerate(testbed.examples("test", 6)):
        Path(tmp_path / "film").mkdir(exist_ok=True)
        Image.fromarray(example.image).save(tmp_path / "film" / f"{i}.png")
    rows = [
        {"video": "film", "question": "what digit is at f6?", "answer": "6"},
        {
            "video": ["film/0.png", "film/1.png"],
            "question": "what colour is at a1?",
            "answer": "red",
        },
    ]
    conversations = [parse(row, f"q:{i}", tmp_path) for i, row in enumerate(rows)]
    made = collate(Films(processor), conversations, frames=4)
    (prepared_batch,) = prepare(model, [made])
    # Four frames, and two: a token for each pair.
    assert prepared_batch.n_visual.tolist() == [2 * 64, 64]
    learned = [processor.tokenizer.decode(row[row != -100]) for row in made["labels"]]
    assert learned == ["6 <eos>", "red <eos>"]
    with torch.no_grad():
        assert model(**made).loss.isfinite()
    both = batches(Films(processor), [*conversations, conversations[0]], 2, frames=2)
    assert [len(b["input_ids"]) for b in both] == [2, 1]


def test_pictures_and_videos_never_share_a_batch():
    film = Conversation((("<video>Why?", "yes"),), (pictures(),), "video", "/", "q")
    parts = split([*TALKS[:3], film, film], 2)
    kinds = [[conversation.kind for conversation in part] for part in parts]
    assert kinds == [["image"] * 2, ["image"], ["video"] * 2]


# ---- real processors of other families -----------------------------------------------------------
def family(name):
    """(processor, its image token) on pictures of a few tokens, with the tokenizer of bytes."""
    import transformers as hf

    def images(module, cls, **options):
        return getattr(
            pytest.importorskip(f"transformers.models.{module}.image_processing_pil_{module}"), cls
        )(**options)

    square = {"height": 16, "width": 16}
    extra = {
        "idefics3": [
            "<fake_token_around_image>",
            "<end_of_utterance>",
            "<global-img>",
            *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
        ],
        "gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        "qwen2_vl": ["<|image_pad|>", "<|video_pad|>"],
    }
    tok = tokenizer("bytes")
    tok.add_tokens(extra.get(name, []), special_tokens=True)
    if name == "llava_next":
        pil = images(
            name,
            "LlavaNextImageProcessorPil",
            size={"shortest_edge": 16},
            crop_size=square,
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        )
        return hf.LlavaNextProcessor(
            pil,
            tok,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ), "<image>"
    if name == "idefics3":
        pil = images(
            name,
            "Idefics3ImageProcessorPil",
            size={"longest_edge": 32},
            max_image_size={"longest_edge": 16},
        )
        return hf.Idefics3Processor(pil, tok, image_seq_len=4), "<image>"
    if name == "gemma3":
        tok.boi_token, tok.eoi_token, tok.image_token = extra[name]
        tok.boi_token_id, _, tok.image_token_id = tok.convert_tokens_to_ids(extra[name])
        return hf.Gemma3Processor(
            images(name, "Gemma3ImageProcessorPil", size=square), tok, image_seq_length=4
        ), "<start_of_image>"
    if name == "paligemma":
        pil = images("siglip", "SiglipImageProcessorPil", size=square)
        pil.image_seq_length = 4
        return hf.PaliGemmaProcessor(pil, tok), "<image>"

    if name == "llava_onevision":
        pil = images(name, "LlavaOnevisionImageProcessorPil", size=square)
        pil.image_grid_pinpoints = [[16, 32], [32, 16], [32, 32]]
        own = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
        return without_videos(hf.LlavaOnevisionProcessor)(pil, tok, **own), "<image>"
    # Without its video half, which needs torchvision.
    pil = images(
        "qwen2_vl",
        "Qwen2VLImageProcessorPil",
        size={"shortest_edge": 64, "longest_edge": 65536},
        patch_size=4,
        merge_size=2,
    )
    return without_videos(hf.Qwen2_5_VLProcessor)(pil, tok), "<|image_pad|>"


FAMILIES = ["llava_next", "llava_onevision", "idefics3", "gemma3", "qwen2_vl"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_expand_pictures_in_their_own_ways(name, side):
    """Tiles, rows, separators: what is labelled must read as the answers do."""
    made_of, image = family(name)
    made = collate(
        made_of, TALKS[1:], padding_side=side, chat_template=CHATML.replace("<image>", image)
    )
    for labels, conversation in zip(made["labels"], TALKS[1:], strict=True):
        assert made_of.tokenizer.decode(labels[labels != -100]) == "".join(
            f"{answer}<|im_end|>" for _, answer in conversation.turns
        )


@pytest.mark.filterwarnings("ignore:__array__")
def test_a_processor_that_puts_all_pictures_first_knows_its_answers():
    paligemma, _ = family("paligemma")
    for conversation in (TALKS[0], TALKS[2]):
        made = collate(paligemma, [conversation], chat_template=CHATML)
        assert paligemma.tokenizer.decode(made["labels"][made["labels"] != -100]) == "".join(
            f"{answer}<|im_end|>" for _, answer in conversation.turns
        )
