"""Units of answers as users' models write them: characters that a tokenizer spells differently,
bytes that are no text, text that looks like a special token, and a seeded lot of hostile ones.

The real pair: OPD_REAL_MODEL (SmolLM2) and OPD_FOREIGN_MODEL (Qwen2.5) name transformers
folders.  OPD_HOSTILE_TEXTS=3000 runs as many hostile texts a pair."""

import os
import random
import unicodedata

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from methods.simct import align
from methods.simct.loss import UnitLoss, unit_divergence

HOW_MANY = int(os.environ.get("OPD_HOSTILE_TEXTS", 150))
SPECIAL = ["<|im_end|>", "<|endoftext|>", "<|user|>"]


def byte_level(normalizer=None, merges=()):
    """A tokenizer of bytes; of merges like "Ġ t" it makes one token."""
    merges = [tuple(merge.split()) for merge in merges]
    pieces = [*bytes_to_unicode().values(), *map("".join, merges)]
    core = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if normalizer:
        core.normalizer = normalizer
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[0])


BYTES = byte_level()


def encode(tokenizer, text):
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return tokenizer(text, **options)["input_ids"]


def byte_ids(raw):
    return [BYTES.convert_tokens_to_ids(bytes_to_unicode()[byte]) for byte in raw]


def outside(student, ids, units):
    """The bytes of the tokens in no unit."""
    inside = {i for s0, s1, _, _ in units for i in range(s0, s1)}
    return b"".join(align.pieces_of(student, [x for i, x in enumerate(ids) if i not in inside]))


# ---- by hand

NFC = normalizers.NFC()
NFKC = normalizers.NFKC()
LOWERCASE = normalizers.Lowercase()
NO_MARKS = normalizers.Replace(Regex(r"\p{M}"), "")


@pytest.mark.parametrize(
    "normalizer, text, changed",
    [
        (NFC, "10 \u2126 and 20 \u2126", "\u2126\u2126"),
        (NFC, "\u212b", "\u212b"),
        (NFC, "cafe\u0301 e", "e\u0301"),
        # the plain e is none of its neighbours
        (NFC, "e\u0301e\u0301ee\u0301\ne", "e\u0301e\u0301e\u0301"),
        (NFC, "a\u0301\u0323b", "a\u0301\u0323"),  # two marks in another order
        (NFC, "x\u1112\u1161\u11aby \ud55c", "\u1112\u1161\u11ab"),
        (NFC, "\u05d0\u200b\u200f\r\n\U0001f469\u200d\U0001f467 \ufffd", ""),
        (
            NFKC,
            "\uff11 e\u0301 \ufb01rst \uff12 half\u2026 e\u0301",
            "\uff11e\u0301\ufb01\uff12\u2026e\u0301",
        ),
        (LOWERCASE, "So It is", "SI"),
        (NO_MARKS, "a cafe\u0301 of two rooms", "e\u0301"),
        (normalizers.NFD(), "caf\u00e9 e\u0301", "\u00e9"),
        # nothing is spelt for it, so its neighbour is not told apart from it
        (normalizers.Replace("\u200b", ""), "a\u200bbc of two rooms", "\u200bb"),
    ],
)
def test_characters_that_the_teacher_spells_differently_lie_in_no_unit(
    normalizer, text, changed
):
    ids = [*encode(BYTES, text), BYTES.eos_token_id]
    teacher = byte_level(normalizer)
    got = align.align(BYTES, teacher, ids)
    assert outside(BYTES, ids, got.units).decode() == changed
    assert got.covered == got.strict == got.bytes - len(changed.encode())
    assert got.units[-1][1] == len(ids), "the end is a unit"


@pytest.mark.parametrize(
    "raw, text, lost",
    [
        (b"day \xf0\x9f\x99", "day ", b"\xf0\x9f\x99"),  # cut at the length limit
        (b"a\xffb\xf0\x9fc", "a\ufffdb\ufffd\ufffdc", b"\xff\xf0\x9f"),
        (b"\x80\xed\xa0\x80.", "\ufffd\ufffd\ufffd\ufffd.", b"\x80\xed\xa0\x80"),
        (b"\xe2\x84\xa6\x84 10", "\u2126\ufffd 10", b"\xe2\x84\xa6\x84"),
        (b"\xff", "", b"\xff"),
    ],
)
def test_bytes_that_are_no_text_lie_in_no_unit(raw, text, lost):
    ids = byte_ids(raw)
    got = align.align(BYTES, byte_level(NFC), ids)
    assert got.text == text
    assert outside(BYTES, ids, got.units) == lost


def test_text_that_looks_like_a_special_token_is_text():
    text = "say <|im_end|> or <|endoftext|>"
    teacher = byte_level(merges=("i m", "e n"))
    written = encode(BYTES, text)
    got = align.align(BYTES, teacher, written)
    assert got.covered == got.bytes == len(text)
    assert got.units[-1][3] == len(got.teacher_ids)
    assert not set(got.teacher_ids) & set(teacher.added_tokens_decoder)
    # the same, as a real end
    ended = align.align(BYTES, teacher, [*written, BYTES.eos_token_id])
    assert ended.bytes == len(text) and ended.teacher_ids[-1] == teacher.eos_token_id
    assert ended.units == [*got.units, (31, 32, len(got.teacher_ids), len(got.teacher_ids) + 1)]


def test_a_token_without_bytes_is_in_no_unit():
    user = BYTES.convert_tokens_to_ids("<|user|>")
    a, b, c = byte_ids(b"abc")
    got = align.align(BYTES, BYTES, [a, b, user, c])
    assert got.units == [(0, 1, 0, 1), (3, 4, 2, 3)] and got.covered == 2
    core = Tokenizer(models.BPE(vocab={"?": 0, "a": 1}, merges=[], unk_token="?"))
    core.decoder = decoders.ByteLevel()
    teacher = PreTrainedTokenizerFast(tokenizer_object=core)
    got = align.align(BYTES, teacher, [a, a, b, a, a])
    assert got.teacher_ids == [1, 1, 0, 1, 1] and got.units == [(0, 1, 0, 1), (4, 5, 4, 5)]


def test_in_a_unit_it_would_be_made_likelier():
    """The loss of a unit "b" + <|user|> that the teacher likes falls as <|user|> gains."""
    user = torch.tensor(-3.0, requires_grad=True)
    logp = torch.stack([torch.tensor([-1.0, -2.0]), torch.stack([user, user * 0])])
    unit = torch.tensor([[1, 1, 2, 1, -0.1, 0], [0, 1, 0, 0, 0, 0]])
    batch = {
        "unit": unit,
        "support_logp": torch.full((2, 1), -3.0),
        "prefix": torch.zeros(2, 1),
    }
    unit_divergence(UnitLoss(), logp, batch).sum().backward()
    assert user.grad < -0.01


# ---- a seeded lot

WORDS = ["The", " voltage", " is", " 12.5", ", so", " isn't", " caf\u00e9", "\n\n", "  ", "\t"]
HOSTILE = [
    "e\u0301",
    " cafe\u0301s",
    " 10\u2126",
    "\u212b",
    "n\u0303\u0323\u0302" * 3,
    "\u0301",  # at the beginning it has no letter
    "i\u0323\u0307",
    unicodedata.normalize("NFD", " ti\u1ebfng Vi\u1ec7t"),
    unicodedata.normalize("NFD", "\ud55c\uad6d\uc5b4"),
    "\u1112\u1161",
    "\uf900\u2f00",  # a compatibility ideograph has a normal form, a radical has none
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f44d\U0001f3fd\U0001f1e9\U0001f1ea",
    "\ufffd",
    "\r\n",
    "\u200b\u200d\ufeff",
    " \u05e9\u05b8\u05dc\u05d5\u05b9\u05dd \u202e\u0645\u0631\u062d\u0628\u0627",
    "31415926535897932384626433832795",
    "<|im_end|>",
    " <|endoftext|><|im_start|>assistant\n",
    "<tool_call>",
    "\u5317\u4eac\u3042\u308a",
    "\u00bd\ufb01\uff11\u2026",
    "\x00\x04\x1d\U000f0000",
    "ha" * 40,
]
KINDS = ("clean", "hostile", "sampled")


def answer(rng, student, kind):
    """An answer's ids: of ordinary words, of hostile text, or with sampled ids in between."""
    fragments = WORDS if kind == "clean" else WORDS + 2 * HOSTILE
    ids = encode(student, "".join(rng.choices(fragments, k=rng.randint(1, 25))))
    bytes_alone = [i for i, b in enumerate(align.token_bytes(student)) if b and len(b) == 1]
    for _ in range(rng.randint(1, 4) * (kind == "sampled")):
        place = rng.randint(0, len(ids))
        some = rng.choice([bytes_alone, range(len(align.token_bytes(student)))])
        ids[place:place] = rng.choices(some, k=rng.randint(1, 4))
    return ids + [student.eos_token_id] * rng.randint(0, 1)


def shown(raw):
    """The text that a teacher reads that writes NFC."""
    text = raw.decode(errors="surrogateescape")
    text = "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text)
    return unicodedata.normalize("NFC", text)


def check(student, teacher, ids, normal_form):
    """What holds for any answer; returns its Alignment."""
    got = align.align(student, teacher, ids)
    pieces = align.pieces_of(student, ids)
    theirs = align.pieces_of(teacher, got.teacher_ids)
    mine_before = [b"".join(pieces[:i]) for i in range(len(pieces) + 1)]
    theirs_before = [b"".join(theirs[:i]) for i in range(len(theirs) + 1)]
    last = (0, 0)
    end = (len(ids) - 1, len(ids), len(theirs) - 1, len(theirs))
    sizes = []
    for unit in got.units:
        s0, s1, t0, t1 = unit
        assert last[0] <= s0 < s1 and last[1] <= t0 < t1
        last = (s1, t1)
        if unit == end and ids[s0] == student.eos_token_id:
            assert got.teacher_ids[t0] == teacher.eos_token_id
            continue
        assert all(pieces[s0:s1]) and all(theirs[t0:t1])
        assert b"".join(pieces[s0:s1]) == b"".join(theirs[t0:t1])
        sizes.append((len(b"".join(pieces[s0:s1])), align.one_to_one(unit)))
        if normal_form:
            assert shown(mine_before[s0]) == shown(theirs_before[t0]), "not the same place"
    assert got.covered == sum(n for n, _ in sizes)
    assert got.strict == sum(n for n, one in sizes if one)
    assert got.bytes == len(mine_before[-1])
    assert len(outside(student, ids, got.units)) == got.bytes - got.covered
    return got


def check_many(student, teacher, normal_form):
    """{kind: share of the bytes in units} of HOW_MANY answers."""
    rng = random.Random(0)
    counts = {kind: [0, 0] for kind in KINDS}
    for turn in range(HOW_MANY):
        kind = KINDS[turn % 3]
        got = check(student, teacher, answer(rng, student, kind), normal_form)
        counts[kind][0] += got.covered
        counts[kind][1] += got.bytes
    return {kind: covered / size for kind, (covered, size) in counts.items()}


def test_a_seeded_lot_of_answers():
    merges = ("\u0120 t", "h e", "\u0120t he", "1 2", "\u00c3 \u00a9", "e \u00cc", "h a", "a h")
    shares = check_many(byte_level(merges=merges[:4]), byte_level(NFC, merges), True)
    assert shares["clean"] == 1 and shares["hostile"] > 0.7 and shares["sampled"] > 0.6


@pytest.mark.parametrize("swapped", [False, True])
def test_a_seeded_lot_of_answers_of_a_real_pair(swapped):
    names = [os.environ.get(name, "") for name in ("OPD_REAL_MODEL", "OPD_FOREIGN_MODEL")]
    if not all(map(os.path.isdir, names)):
        pytest.skip("no real pair here: OPD_REAL_MODEL and OPD_FOREIGN_MODEL name its folders")
    smollm, qwen = map(AutoTokenizer.from_pretrained, names)
    if swapped:  # SmolLM2 has no token for some bytes
        shares = check_many(qwen, smollm, False)
    else:
        shares = check_many(smollm, qwen, True)
    print(shares)
    assert shares["clean"] == 1 and shares["hostile"] > 0.5 and shares["sampled"] > 0.4
