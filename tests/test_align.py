"""Units of two tokenizations: by hand, by properties over random texts and real tokenizers, and
where characters are cut."""

import os
from itertools import accumulate
from pathlib import Path

import pytest
from conftest import argv
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from methods.simct import align
from opd import records
from worlds import sums

TEXTS = [
    "the quick brown fox jumps over the lazy dog 12 34 567 8901",
    "happy day, happier days; naïve café 北京 東京 🙂🙃 👩‍👩‍👧 e\u0301 \n\ttabs",
    "12+34=46\n46-7=39\n#39",
    "It's 3.14159, isn't it?  Two  spaces.",
    "ありがとう ございます 12345",
] * 30


def wrap(core):
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<end>"])
    core.train_from_iterator(TEXTS, trainers.BpeTrainer(show_progress=False, **options))
    return core


def byte_fallback():
    """As Llama 2 and Gemma: ▁ for a space, <0x..> for what has no token."""
    merges = ["▁ d", "a y", "h a", "p p", "▁ t", "h e", "1 2", "3 4", "▁d a"]
    pieces = ["<unk>", "<end>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    pieces += "abcdefghijklmnopqrstuvwxyz0123456789+-=#,."
    pieces += [merge.replace(" ", "") for merge in merges]
    model = models.BPE(
        vocab={p: i for i, p in enumerate(pieces)},
        merges=[tuple(merge.split()) for merge in merges],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    core = Tokenizer(model)
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    space = decoders.Replace("▁", " ")
    steps = [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return core


def unigram():
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    options = dict(vocab_size=200, special_tokens=["<unk>", "<end>"], unk_token="<unk>")
    core.train_from_iterator(TEXTS, trainers.UnigramTrainer(show_progress=False, **options))
    return core


def wordpiece():
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece(cleanup=False)
    options = dict(vocab_size=300, special_tokens=["[UNK]", "<end>"])
    core.train_from_iterator(TEXTS, trainers.WordPieceTrainer(show_progress=False, **options))
    return core


BUILT = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "unigram": unigram,
    "wordpiece": wordpiece,
}
KINDS = (*BUILT, "characters", "merged digits", "SmolLM2")


@pytest.fixture(scope="module")
def tokenizers():
    found = {kind: wrap(build()) for kind, build in BUILT.items()}
    found["characters"] = sums.build_tokenizer()
    found["merged digits"] = sums.build_tokenizer(merges=sums.TWO_DIGITS)
    real = Path(os.environ.get("OPD_REAL_MODEL", "/nonexistent"))
    if real.is_dir():
        found["SmolLM2"] = AutoTokenizer.from_pretrained(real)
    return found


def some(tokenizers, *kinds):
    """The tokenizers of these kinds; skips a test of the real one where there is none."""
    if "SmolLM2" in kinds and "SmolLM2" not in tokenizers:
        pytest.skip("no real model here: OPD_REAL_MODEL is not set")
    return [tokenizers[kind] for kind in kinds]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- units


def ends(text):
    """ "hap|py" -> [3, 5]"""
    return list(accumulate(map(len, text.split("|"))))


@pytest.mark.parametrize(
    "student, teacher, want",
    [
        # two units, not one span of all
        (ends("hap|py| d|ay"), ends("ha|ppy| da|y"), [(0, 2, 0, 2), (2, 4, 2, 4)]),
        # the match after a mismatch is not swallowed
        (ends("=|123| ok"), ends("=|1|2|3| ok"), [(0, 1, 0, 1), (1, 2, 1, 4), (2, 3, 4, 5)]),
        ([0, 2, 2, 5], [2, 5], [(0, 3, 0, 1), (3, 4, 1, 2)]),  # tokens without bytes
        ([], [], []),
        ([3], [4], []),
    ],
)
def test_units_by_hand(student, teacher, want):
    assert align.aligned_units(student, teacher) == want


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=20),
    st.lists(st.integers(1, 4), min_size=1, max_size=20),
)
def test_units_are_the_finest_division_that_cuts_no_token(a, b):
    """Against the definition: connected components of tokens that share a byte."""
    n = min(sum(a), sum(b))
    a, b = ([e for e in accumulate(x) if e < n] + [n] for x in (a, b))
    # token of either side at every byte
    owner = [(sum(e <= i for e in a), sum(e <= i for e in b)) for i in range(n)]
    groups = [[0]]
    for i in range(1, n):
        linked = owner[i][0] == owner[i - 1][0] or owner[i][1] == owner[i - 1][1]
        groups[-1].append(i) if linked else groups.append([i])
    want = []
    for g in groups:
        (first_a, first_b), (last_a, last_b) = owner[g[0]], owner[g[-1]]
        want.append((first_a, last_a + 1, first_b, last_b + 1))
    assert align.aligned_units(a, b) == want
    swapped = [(t0, t1, s0, s1) for s0, s1, t0, t1 in want]
    assert align.aligned_units(b, a) == swapped


# ---- tokenizers

PLAIN = st.text(alphabet=st.sampled_from("abdehpty 0123456789+-=#\n,."), max_size=40)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=24)  # no surrogates
FAST = dict(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def spell(tokenizer, ids):
    return b"".join(align.pieces_of(tokenizer, ids))


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "SmolLM2"])
@settings(max_examples=60, **FAST)
@given(text=ANY)
def test_token_bytes_spell_any_text(tokenizers, kind, text):
    """Wherever the tokenizer gives the text back (SmolLM2 has no token for some bytes)."""
    (tokenizer,) = some(tokenizers, kind)
    ids = encode(tokenizer, text)
    assume("▁" not in text and tokenizer.decode(ids, skip_special_tokens=False) == text)
    assume(not any(special in text for special in tokenizer.all_special_tokens))
    assert spell(tokenizer, ids) in (text.encode(), b" " + text.encode())


# every kind on both sides, and with every family of another
RING = [
    (student, KINDS[(i + shift) % len(KINDS)])
    for i, student in enumerate(KINDS)
    for shift in (0, 1, 3)
]


def inner_ends(tokenizer, ids):
    return set(accumulate(map(len, align.pieces_of(tokenizer, ids[:-1]))))


@pytest.mark.parametrize("student, teacher", RING)
@settings(max_examples=25, **FAST)
@given(text=st.one_of(PLAIN, ANY), ended=st.booleans())
def test_units_of_real_tokenizers(tokenizers, student, teacher, text, ended):
    a, b = some(tokenizers, student, teacher)
    ids = [i for i in encode(a, text) if i != a.eos_token_id] + [a.eos_token_id] * ended
    got = align.align(a, b, ids)
    place = (0, 0)
    for s0, s1, t0, t1 in got.units:
        assert s0 >= place[0] and t0 >= place[1], "in order"
        place = (s1, t1)
        mine, theirs = ids[s0:s1], got.teacher_ids[t0:t1]
        one, two = spell(a, mine), spell(b, theirs)
        # a tokenizer may put a space before the text
        assert one == two or (s0 == 0 and b" " + one == two)
        common = inner_ends(a, mine) & inner_ends(b, theirs) - {0, len(one)}
        assert s0 == 0 or not common, "no common end strictly inside"
    if ended and got.covered == got.bytes and place[0] == len(ids):
        n = len(got.teacher_ids)
        assert got.units[-1] == (len(ids) - 1, len(ids), n - 1, n)
        assert got.teacher_ids[-1] == b.eos_token_id
    assert 0 <= got.strict <= got.covered <= got.bytes


PAIRS = [
    ("byte-level", "byte-fallback"),
    ("byte-fallback", "byte-level"),
    ("byte-level", "SmolLM2"),
    ("SmolLM2", "byte-fallback"),
]
CHARACTERS = ["🙂 ok", "北京 12", "naïve café", "e\u0301a", "👩‍👩‍👧", "  two", "\n\n12", "a\tb"]


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_whole_texts_are_covered_whatever_their_characters(tokenizers, student, teacher):
    a, b = some(tokenizers, student, teacher)
    for text in CHARACTERS:
        got = align.align(a, b, encode(a, text))
        assert got.covered == got.bytes and got.units[-1][3] == len(got.teacher_ids)
        assert got.text.lstrip(" ") == text.lstrip(" ")


def test_an_answer_cut_inside_a_character_keeps_what_stands_before(tokenizers):
    a, b = some(tokenizers, "byte-fallback", "byte-level")
    ids = encode(a, "day 🙂")
    got = align.align(a, b, ids[:-2])  # two of the emoji's four bytes are missing
    assert got.text.strip() == "day" and 0 < got.covered == got.bytes - 2
    assert all(s1 <= len(ids) - 4 for _, s1, _, _ in got.units)
    # bytes that are no text, in the middle: only they have no unit
    garbage = ids[:-1] + encode(a, "day") + [a.eos_token_id]
    got = align.align(a, b, garbage)
    assert got.text.strip() == "day \ufffd\ufffd\ufffd day" and got.covered == got.bytes - 3
    assert got.units[-1][1] == len(garbage)


def test_the_students_own_ids_are_aligned_and_not_those_of_its_text(tokenizers):
    """1 and 2 sampled one by one, where the tokenizer would have written 12."""
    a, b = some(tokenizers, "merged digits", "characters")
    one_by_one = [a.convert_tokens_to_ids(c) for c in "12"]
    assert encode(a, "12") != one_by_one
    assert align.align(a, b, one_by_one).units == [(0, 1, 0, 1), (1, 2, 1, 2)]
    assert align.align(a, b, encode(a, "12")).units == [(0, 1, 0, 2)]


def test_an_explicit_pair_of_ends(tokenizers):
    a, b = some(tokenizers, "characters", "merged digits")
    ids = encode(a, "7")
    user = a.convert_tokens_to_ids("<|user|>")
    got = align.align(a, b, ids + [user], ends=(user, 1))
    assert got.units == [(0, 1, 0, 1), (1, 2, 1, 2)] and got.teacher_ids[-1] == 1
    assert align.align(a, b, ids).units == [(0, 1, 0, 1)], "what did not end has no end"


# ---- vocabularies


def test_the_shared_vocabulary_is_matched_on_bytes(tokenizers):
    """A space is Ġ here and ▁ there, a line break Ċ here and <0x0A> there."""
    a, b = some(tokenizers, "byte-level", "byte-fallback")
    both = align.shared_vocabulary(a, b)
    assert all(align.token_bytes(a)[i] == align.token_bytes(b)[j] for i, j in both.items())
    for mine, theirs in (("Ċ", "<0x0A>"), ("Ġd", "▁d")):
        assert both[a.convert_tokens_to_ids(mine)] == b.convert_tokens_to_ids(theirs)
    assert a.eos_token_id not in both, "ends are a pair of their own, not bytes"
    # ambiguous: byte-fallback writes a 1 as `1` and could write it as <0x31>
    assert b.convert_tokens_to_ids("1") != b.convert_tokens_to_ids("<0x31>")
    assert a.convert_tokens_to_ids("1") not in both


# ---- the command


def test_the_command_shows_units_and_shares(world, capsys):
    student = world.toy / "student"
    flags = argv(student=student, teacher=world.toy / "teacher_merged_digits")
    done = align.main([*flags, "--text", "7+5=12"])
    assert done["covered"] == 1 and done["strict"] == pytest.approx(4 / 6)
    assert "'1|2'(2:1)" in capsys.readouterr().out
    done = align.main([*flags, "--rollouts", str(world.rollouts)])
    assert done["answers"] == 32 and done["shared_vocabulary"] == 19
    assert 0 < done["strict"] <= done["covered"] <= 1


def test_an_unknown_decoder_is_refused():
    core = Tokenizer(models.BPE(vocab={"a": 0, "<end>": 1}, merges=[]))
    core.decoder = decoders.CTC()
    with pytest.raises(records.BadInput, match="decoder: expected steps .*, got CTC"):
        align.token_bytes(wrap(core))
