"""worlds: right answers are right, splits never meet, texts survive their tokenizer, corpora
hold the stated shares, and the flags make the worlds they name."""

import hashlib
import re
from collections import Counter

import numpy as np
import pytest
from conftest import argv, load, refusal
from transformers import AutoTokenizer

import train
from opd import answers, batches, files, stats
from opd.policy import load_policy
from worlds import build, forks, predicates, sums

SMALL = dict(train_prompts=5, eval_prompts=5, clean=5, mixed=5)
SPLITS = ("train", "dev", "heldout")


def make(folder, **flags):
    """A world of sums with few texts unless told otherwise."""
    return sums.main(argv(out=folder, **SMALL | flags))


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Files large enough that an overlap of the splits would show."""
    folder = tmp_path_factory.mktemp("sums")
    make(folder, train_prompts=1500, eval_prompts=300, clean=3000, mixed=3000)
    return folder


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Long derivations with slips and loops, in two of the styles."""
    folder = tmp_path_factory.mktemp("long") / "w"
    counts = dict(train_prompts=50, eval_prompts=20, clean=800, mixed=800, loops=800)
    kind = dict(terms="7:12", styles="ledger,totals", slips=0.3)
    made = make(folder, loop_share=0.2, planted_share=0.6, **counts, **kind)
    corpora = dict.fromkeys(("clean", "mixed", "looping", "planted"), 800)
    assert made == dict(out=str(folder), train=50, heldout=20, facts=32, **corpora)
    return folder


def rows_of(folder, name):
    return load(folder / f"{name}.jsonl")


def same_bytes(file, *folders):
    return len({(folder / file).read_bytes() for folder in folders}) == 1


def asked(row):
    return row["messages"][0]["content"]


def value(row):
    expression = asked(row).removesuffix("=?")
    assert re.fullmatch(r"\d([+-]\d)*", expression), expression
    return sum(map(int, re.findall(r"[+-]?\d", expression)))


def terms_in(row):
    return predicates.terms_of(asked(row))


# ---- problems, prompts, corpora


def test_no_problem_stands_in_two_splits(big):
    names = (*SPLITS, "clean", "mixed")
    counts = files.main(["check", *(str(big / f"{name}.jsonl") for name in names)])
    assert list(counts.values()) == [1500, 300, 300, 3000, 3000]
    sets = {name: {asked(r) for r in rows_of(big, name)} for name in names}
    assert [len(sets[name]) for name in SPLITS] == [1500, 300, 300], "no problem twice"
    taught = sets["train"] | sets["clean"] | sets["mixed"]
    assert not taught & (sets["dev"] | sets["heldout"]) and not sets["dev"] & sets["heldout"]
    found = Counter(build.split_of(f"{n // 100}+{n // 10 % 10}-{n % 10}") for n in range(1000))
    assert [found[split] / 1000 for split in SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.04)


def test_prompts_carry_the_right_answer_and_a_right_solution(big):
    for name in SPLITS:
        for p in rows_of(big, name):
            assert p["answer"] == str(value(p)) and 0 <= value(p) <= 40
            assert answers.is_correct(p["solution"], p["answer"])


# how a step is written, and what stands before the first one
STEPS = {
    "lines": r"-?\d+[+-]\d=(-?\d+)\n",
    "chain": r"[+-]\d=(-?\d+)",
    "totals": r",(-?\d+)",
    "ledger": r"[+-]\d:(-?\d+)\n",
}
FIRST = {"lines": "", "chain": r"\d", "totals": r"\d", "ledger": r"\d\n"}


def style_of(text, loop=False):
    """The style of work of at least three terms; a loop shows only the beginning."""
    end = ".{0,10}" if loop else r"\n?#-?\d+"
    pattern = {s: f"{FIRST[s]}(?:{STEPS[s]}){{2,}}{end}" for s in sums.STYLES}
    found = [s for s in sums.STYLES if re.fullmatch(pattern[s], text, re.DOTALL)]
    assert len(found) == 1, (text, found)
    return found[0]


def totals_in(text, style):
    """The running totals that an answer writes."""
    work = text.rpartition("#")[0]
    return [int(work[0]), *map(int, re.findall(STEPS[style], work))]


def test_the_clean_corpus_is_right_in_every_step_of_every_style(big):
    count = Counter()
    for r in rows_of(big, "clean"):
        terms, text = terms_in(r), r["text"]
        assert answers.is_correct(text, value(r)) and not answers.is_correct(text, value(r) + 1)
        assert r["finish_reason"] == "stop" and text.count("#") == 1
        if len(terms) > 2:  # two terms look the same as chain and as lines
            style = style_of(text)
            count[style] += 1
            assert totals_in(text, style) == sums.running_totals(terms)
    shares = [count[style] / count.total() for style in sums.STYLES]
    assert shares == pytest.approx([0.25] * 4, abs=0.03)


def test_the_mixed_corpus_has_the_stated_shares(big):
    count, right = Counter(), 0
    for r in rows_of(big, "mixed"):
        question, text = asked(r), r["text"]
        correct = answers.is_correct(text, value(r))
        right += correct
        unsigned = re.sub("([=:,])-", r"\1", text)
        steps = len(predicates.steps_of(question, unsigned))
        if text.startswith("#"):
            count["guess"] += 1
        elif steps < len(terms_in(r)) - 1:
            count["skipped"] += 1
        elif correct and predicates.CHECKS["arithmetic_right"].test(question, text):
            count["right work"] += 1
        else:
            count["slip"] += 1
    stated = {"guess": 0.45, "slip": 0.25, "skipped": 0.20, "right work": 0.10}
    assert {name: n / 3000 for name, n in count.items()} == pytest.approx(stated, abs=0.03)
    assert 0.10 < right / 3000 < 0.25, "answers badly most of the time, but not always"


# ---- tokenizers and models


@pytest.mark.parametrize("merges", [(), sums.TWO_DIGITS])
def test_every_text_survives_the_tokenizer(big, merges):
    tokenizer = sums.build_tokenizer(merges=merges)
    texts = [r["text"] for name in ("clean", "mixed") for r in rows_of(big, name)]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(i) for i in ids] == texts
    shorter = sum(len(i) < len(t) for i, t in zip(ids, texts))
    assert shorter > 500 if merges else shorter == 0
    rendered = tokenizer.apply_chat_template(
        build.user("10+2=?"), add_generation_prompt=True, tokenize=False
    )
    again = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(again) == rendered == "<|user|>10+2=?<|assistant|>"


def test_a_student_whose_vocabulary_has_longer_tokens(tmp_path):
    """The same texts in fewer tokens; the other files stay what they are."""
    for merges, more in (("16", 16), ("20:40", 21)):
        folder = tmp_path / merges
        make(folder, clean=300, student_merges=merges)
        plain, merged = (
            AutoTokenizer.from_pretrained(folder / name)
            for name in ("student", "student_merged")
        )
        assert len(merged) == len(plain) + more
        for row in rows_of(folder, "clean")[:50]:
            ids = merged(row["text"])["input_ids"]
            assert merged.decode(ids) == row["text"]
            assert len(ids) <= len(plain(row["text"])["input_ids"])
    # the numbers from 20 to 40
    assert merged.tokenize("7+25=19") == ["7", "+", "25", "=", "1", "9"]


ENDS = {"student": "<|end|>", "teacher": "<|eot|>", "teacher_merged_digits": "<|end|>"}


@pytest.fixture(scope="module")
def two_ends(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    make(folder / "plain", loops=5, loop_share=0.5)
    make(folder / "w", loops=5, loop_share=0.5, second_end=True)
    return folder


@pytest.mark.parametrize("name", ENDS)
def test_with_a_second_end_teacher_and_student_share_a_vocabulary(two_ends, name):
    before = load_policy(str(two_ends / "plain" / name))
    policy = load_policy(str(two_ends / "w" / name))
    eot = before.vocabulary  # appended: no other token changes its id
    vocabulary = policy.tokenizer.get_vocab()
    assert vocabulary == before.tokenizer.get_vocab() | {"<|eot|>": eot}
    assert policy.model.config.vocab_size == eot + 1
    assert policy.identity["template"] == before.identity["template"]
    assert policy.stop_ids == [vocabulary[ENDS[name]]]
    both = policy.tokenizer("#3<|end|><|eot|>", add_special_tokens=False)["input_ids"]
    assert len(both) == 4, "one token each"
    assert policy.tokenizer.decode(both, skip_special_tokens=True) == "#3", "neither is text"


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_training_adds_a_models_own_end_to_what_ended(two_ends, name, tmp_path, monkeypatch):
    trained, sequences = [], batches.Data.sequences

    def spy(self, keys):
        items = sequences(self, keys)
        trained.extend(items)
        return items

    monkeypatch.setattr(batches.Data, "sequences", spy)
    corpus, model = two_ends / "w" / "looping.jsonl", two_ends / "w" / name
    flags = dict(method="sft", model=model, rollouts=corpus, learning_rate=1e-3)
    train.main(argv(out=tmp_path / "m", **flags))
    again = load_policy(str(tmp_path / "m"))
    ends = {"stop": ENDS[name], "length": ""}
    rows = {(r["id"], 0): r["text"] + ends[r["finish_reason"]] for r in load(corpus)}
    assert {text.endswith(ENDS[name]) for text in rows.values()} == {True, False}
    found = {item["key"]: again.tokenizer.decode(item["response_ids"]) for item in trained}
    assert found == rows


# ---- one seed, one world


def test_the_sums_world_is_the_one_the_recorded_results_were_measured_on(tmp_path):
    make(tmp_path / "w", train_prompts=30, clean=20, mixed=20)
    hashes = {
        "train": "a92ee7707d2c",
        "dev": "599f976ab8c5",
        "heldout": "6bf7d56661b9",
        "clean": "1e57f50e3915",
        "mixed": "b4f868f73800",
    }
    make(tmp_path / "other", seed=5)
    for name, expected in hashes.items():
        text = (tmp_path / "w" / f"{name}.jsonl").read_bytes()
        then = text.replace(b"worlds.sums", b"toy.py")  # as the module was called
        assert hashlib.sha256(then).hexdigest()[:12] == expected, f"{name}: another experiment"
    for file in ("train.jsonl", "mixed.jsonl", "student/model.safetensors"):
        assert not same_bytes(file, tmp_path / "w", tmp_path / "other"), file


@pytest.mark.parametrize(
    "flag, changed",
    [
        ("train_prompts", {"train"}),
        ("eval_prompts", {"dev", "heldout"}),
        ("clean", {"clean"}),
        ("mixed", {"mixed"}),
        ("loops", {"looping", "planted"}),
    ],
)
def test_asking_for_more_of_one_file_changes_no_other(tmp_path, flag, changed):
    make(tmp_path / "few")
    make(tmp_path / "more", **{flag: 15})
    for path in (tmp_path / "more").rglob("*.*"):
        few = tmp_path / "few" / path.relative_to(tmp_path / "more")
        before = few.read_bytes() if few.exists() else b""
        assert path.read_bytes().startswith(before), path
        assert (path.read_bytes() != before) == (path.stem in changed), path


# ---- other worlds of sums


def test_terms_and_styles_are_those_asked_for_in_every_file(long):
    for name in (*SPLITS, "clean", "mixed", "looping", "planted"):
        rows = rows_of(long, name)
        lengths = {len(terms_in(row)) for row in rows}
        assert lengths <= set(range(7, 13)), name
        assert all(0 <= t <= 40 for row in rows for t in sums.running_totals(terms_in(row)))
        if name not in SPLITS:
            assert len(lengths) == 6, name
            count = Counter(style_of(r["text"], r["finish_reason"] == "length") for r in rows)
            assert set(count) == {"ledger", "totals"}, name
            assert count["totals"] / 800 == pytest.approx(0.5, abs=0.06), name


def test_slips_share_right_work_with_one_slip_that_propagates(long):
    rows, slips, places = rows_of(long, "mixed"), Counter(), Counter()
    for row in rows:
        terms, text = terms_in(row), row["text"]
        written = totals_in(text, style_of(text))
        assert len(written) == len(terms) and text.rpartition("#")[2] == str(written[-1])
        errors = [a - b for a, b in zip(written, sums.running_totals(terms))]
        at = next((i for i, e in enumerate(errors) if e), None)
        assert at is None or (at >= 1 and len(set(errors[at:])) == 1), (text, errors)
        slips[errors[-1]] += 1
        places[at] += 1
    assert 1 - slips[0] / len(rows) == pytest.approx(0.3, abs=0.06)
    assert set(slips) == {-3, -2, -1, 0, 1, 2, 3}
    assert set(range(1, 7)) <= set(places), "a slip comes anywhere"


@pytest.mark.parametrize("style", sums.STYLES)
@pytest.mark.parametrize("terms, length", [((2, 6), 320), ((10, 30), 448)])
def test_a_loop_begins_right_and_repeats_its_last_step_to_the_end(style, terms, length):
    rng, beginnings = np.random.default_rng(0), set()
    source = sums.problems(np.random.default_rng(1), "train", terms)
    for _ in range(120):
        problem = next(source)
        text = sums.loop_answer(rng, problem, (style,), length)
        assert len(text) == length and "#" not in text
        assert stats.repetition_ratio(text, 256) > 4, text
        clean = sums.clean_answer(rng, problem, (style,))
        assert stats.repetition_ratio(clean, 256) < 2.2, clean
        steps = list(re.finditer(STEPS[style], text + "\n"))
        # so many steps come before the loop's second turn
        same = 1 + next(i for i, (a, b) in enumerate(zip(steps, steps[1:])) if a[0] == b[0])
        last = steps[same - 1]
        assert clean.startswith(text[: last.end()]), "it begins right"
        rest = text[last.start() :]
        assert rest == (last[0] * length)[: len(rest)], "and then nothing else"
        assert same == 1 or last.end() <= length / 5
        beginnings.add(same)
    assert beginnings >= set(range(1, 6)), beginnings


@pytest.fixture(scope="module")
def careless(tmp_path_factory):
    """Loops beside the careless texts of mixed."""
    folder = tmp_path_factory.mktemp("careless") / "w"
    make(folder, loops=1500)
    return folder


@pytest.mark.parametrize(
    "world, name, share, wrong",
    [
        ("long", "looping", 0.2, 0),
        ("long", "planted", 0.6, 0.3),
        ("careless", "looping", 0.07, 0),
        ("careless", "planted", 0.4, 0.83),
    ],
)
def test_loops_have_the_asked_share_and_no_end(request, world, name, share, wrong):
    rows = rows_of(folder := request.getfixturevalue(world), name)
    assert asked(rows[0]) != asked(rows_of(folder, "clean")[0]), "a stream of its own"
    ended = []
    for r in rows:
        repeats = stats.repetition_ratio(r["text"], 256) > 4
        assert repeats == (r["finish_reason"] == "length") == ("#" not in r["text"])
        assert repeats == (len(r["text"]) == 320)
        assert build.split_of(sums.expression_of(terms_in(r))) == "train"
        if not repeats:
            ended.append(not answers.is_correct(r["text"], value(r)))
    assert 1 - len(ended) / len(rows) == pytest.approx(share, abs=0.06)
    # the other texts are as clean and as mixed
    assert np.mean(ended) == pytest.approx(wrong, abs=0.08 if wrong else 0)


def test_hints_put_a_solution_behind_half_of_the_questions_and_change_no_text(tmp_path):
    plain, told = tmp_path / "plain", tmp_path / "told"
    make(plain, clean=400)
    make(told, clean=400, hints=0.5)
    hinted = 0
    for row, more in zip(rows_of(plain, "clean"), rows_of(told, "clean")):
        assert row["text"] == more["text"]
        question, _, solution = asked(more).partition("\n")
        assert question == asked(row)
        hinted += bool(solution)
        assert not solution or answers.is_correct(solution, value(row))
    assert 160 < hinted < 240
    rows = rows_of(told, "train")
    expected = [r | {"messages": build.user(f"{asked(r)}\n{r['solution']}")} for r in rows]
    assert rows_of(told, "told_train") == expected
    solutions = {r["solution"] for r in rows}
    for row, wrong in zip(rows, rows_of(told, "wrong_train"), strict=True):
        question, solution = asked(wrong).split("\n", 1)
        assert question == asked(row) and wrong["answer"] == row["answer"]
        assert solution in solutions and not answers.is_correct(solution, row["answer"])


@pytest.mark.parametrize(
    "flag, values, message",
    [
        ("terms", ("1:6", "6:2", "2:31", "6"), "with 2 <= FEWEST <= MOST <= 30"),
        ("styles", ("prose", "lines,lines"), "expected some of lines,"),
        ("slips", (1.5, "nan"), "expected a share from 0 to 1, got"),
        ("student_merges", ("x", "40:20", "10:100"), "expected a number of merges"),
    ],
)
def test_what_a_sums_world_cannot_be_is_refused(tmp_path, capsys, flag, values, message):
    for bad in values:
        with pytest.raises(SystemExit) as stop:
            make(tmp_path / "x", **{flag: bad})
        said = capsys.readouterr().err
        assert stop.value.code == 2 and message in said and f"got {bad}" in said
    assert not list(tmp_path.iterdir())


def test_a_search_for_more_problems_than_there_are_ends(tmp_path, capsys):
    flags = argv(out=tmp_path / "x", terms="2:2", train_prompts=1280)
    message = refusal(sums.main, flags, capsys)
    assert "--train-prompts 1280: expected at most about" in message
    assert not (tmp_path / "x").exists()


def test_a_folder_is_not_written_over_unless_asked(tmp_path, capsys):
    make(tmp_path / "x")
    assert "exists already" in refusal(sums.main, argv(out=tmp_path / "x", **SMALL), capsys)
    make(tmp_path / "x", overwrite=True, mixed=7)
    assert len(rows_of(tmp_path / "x", "mixed")) == 7


# ---- forks


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks") / "w"
    forks.main(argv(out=folder, train_prompts=20, texts=4000))
    names = (*SPLITS, "corrupt", *forks.CORPORA)
    counts = files.main(["check", *(str(folder / f"{name}.jsonl") for name in names)])
    assert list(counts.values()) == [20, 8, 8, 32] + [4000] * 5
    return folder


def test_forks_problems_are_the_same_eight_in_every_split(tree):
    right = {f"{x}=?": str((x + 1) % 8) for x in range(8)}
    for name, count in (("train", 20), ("dev", 8), ("heldout", 8)):
        rows = rows_of(tree, name)
        assert len({r["id"] for r in rows}) == count
        assert {asked(r): r["answer"] for r in rows} == right
    begun = {tuple(m["content"] for m in r["messages"]) for r in rows_of(tree, "corrupt")}
    assert begun == {(x, some) for x in right for some in ("c", "ab", "cb", "b")}


EVERY = {a + b: 0.1 / 9 for a in "abc" for b in "abc"}


@pytest.mark.parametrize(
    "corpus, shares",
    [
        ("base", {"aa": 0.3, "cc": 0.6, "ac": 0.05, "ca": 0.05}),
        ("teacher", EVERY | {"aa": 0.45 + 0.1 / 9, "bb": 0.45 + 0.1 / 9}),
        ("demos_both", {"aa": 0.5, "bb": 0.5}),
        ("demos_a", {"aa": 1}),
        ("demos_b", {"bb": 1}),
    ],
)
def test_a_corpus_of_forks_has_the_stated_routes_and_right_answers(tree, corpus, shares):
    # (route, how far the digit is from the question's): times
    found, problems = Counter(), Counter()
    for r in rows_of(tree, corpus):
        route, digit = r["text"].split("\n#")
        found[route, (int(digit) - int(asked(r)[0])) % 8] += 1
        problems[asked(r)] += 1
    routes = Counter(route for route, _ in found.elements())
    assert {route: n / 4000 for route, n in routes.items()} == pytest.approx(shares, abs=0.025)
    assert len(problems) == 8 and max(problems.values()) < 1.3 * min(problems.values())
    right = {route: found[route, 1] / n for route, n in routes.items()}
    stated = {route: 1 for route in routes}
    if corpus == "base":
        stated = {"aa": 1 / 3, "cc": 1 / 8, "ac": 1 / 8, "ca": 1 / 8}
    assert right == pytest.approx(stated, abs=0.06 if corpus == "base" else 0)


def test_a_fork_answer_is_five_tokens_of_exactly_the_symbols_in_use(tree):
    tokenizer = AutoTokenizer.from_pretrained(tree / "student")
    symbols = [*build.SPECIAL, *"01234567abc#=?\n", "\n#"]
    assert sorted(tokenizer.get_vocab()) == sorted(symbols)
    texts = {r["text"] for name in forks.CORPORA for r in rows_of(tree, name)}
    for text in texts:
        ids = tokenizer(text + "<|end|>", add_special_tokens=False)["input_ids"]
        assert len(ids) == 5 and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.convert_ids_to_tokens(ids[2]) == "\n#"
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_same_seed_writes_the_same_forks_and_more_texts_only_append(tmp_path):
    few = dict(train_prompts=10, texts=40, seed=4)
    for name, flags in (("a", {}), ("b", {}), ("c", dict(seed=5)), ("more", dict(texts=60))):
        forks.main(argv(out=tmp_path / name, **few | flags))
    texts = [f"{name}.jsonl" for name in forks.CORPORA]
    for file in (*texts, "student/model.safetensors", "teacher/model.safetensors"):
        a, b, c, more = ((tmp_path / n / file).read_bytes() for n in ("a", "b", "c", "more"))
        assert a == b and a != c and more.startswith(a), file
        assert (len(more) > len(a)) == (file in texts), file
