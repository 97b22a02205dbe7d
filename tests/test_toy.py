"""worlds.sums: right answers are right, splits never meet, and every text survives its
tokenizer; of forks: corpora hold what they say."""

import re
from collections import Counter

import numpy as np
import pytest
from conftest import argv, load, refusal

import train
from opd import answers, batches, files, records, stats
from opd.policy import load_policy, stop_ids
from worlds import predicates, sums


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Files large enough that an overlap of the splits would show."""
    folder = tmp_path_factory.mktemp("toy")
    sums.main(argv(out=folder, train_prompts=1500, eval_prompts=300, clean=6000, mixed=6000))
    return folder


def questions(path):
    return [r["messages"][0]["content"].removesuffix("=?") for r in load(path)]


def value(expression):
    assert re.fullmatch(r"\d([+-]\d)*", expression), expression
    return sum(map(int, re.findall(r"[+-]?\d", expression)))


def test_no_problem_stands_in_two_splits(big):
    sets = {
        name: set(questions(big / f"{name}.jsonl"))
        for name in ("train", "dev", "heldout", "clean", "mixed")
    }
    taught = sets["train"] | sets["clean"] | sets["mixed"]
    assert (
        not sets["dev"] & sets["heldout"]
        and not taught & sets["dev"]
        and not taught & sets["heldout"]
    )
    assert [
        len(questions(big / f"{n}.jsonl"))
        for n in ("train", "dev", "heldout", "clean", "mixed")
    ] == [1500, 300, 300, 6000, 6000]
    assert [len(sets[n]) for n in ("train", "dev", "heldout")] == [1500, 300, 300], (
        "no problem stands twice in one file"
    )
    shares = (
        np.bincount(
            [
                ("train", "dev", "heldout").index(sums.split_of(f"{i}+{j}-{k}"))
                for i in range(10)
                for j in range(10)
                for k in range(10)
            ]
        )
        / 1000
    )
    assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 0.04


def test_prompts_carry_the_right_answer_and_a_right_solution(big):
    for name in ("train", "dev", "heldout"):
        for p in files.read(big / f"{name}.jsonl", "prompts"):
            expression = p["messages"][0]["content"].removesuffix("=?")
            assert p["answer"] == str(value(expression)) and answers.is_correct(
                p["solution"], p["answer"]
            )
            assert "answer" not in p["messages"][0]["content"] and 0 <= value(expression) <= 40


def totals_in(text, style):
    """The running totals an answer writes, read back with a parser per style."""
    work = text.rpartition("#")[0].strip("\n")
    if style == "totals":
        return list(map(int, work.split(",")))
    if style == "ledger":
        return [int(line.split(":")[-1]) for line in work.split("\n")]
    if style == "chain":
        first = re.match(r"\d+", work)[0]
        return [int(first)] + list(map(int, re.findall(r"=(-?\d+)", work)))
    return [int(work[0])] + [int(line.split("=")[1]) for line in work.split("\n")]


@pytest.mark.parametrize("style", sums.STYLES)
def test_clean_work_is_right_in_every_step_of_every_style(style):
    rng, source = np.random.default_rng(0), sums.problems(np.random.default_rng(1), "train")
    for _ in range(300):
        terms = next(source)
        text = sums.clean_answer(rng, terms, (style,))
        assert totals_in(text, style) == [sum(terms[: i + 1]) for i in range(len(terms))]
        assert text.rpartition("#")[2] == str(sum(terms)) and text.count("#") == 1
        assert answers.is_correct(text, sum(terms)) and not answers.is_correct(
            text, sum(terms) + 1
        )
        question = sums.expression_of(terms) + "=?"
        assert predicates.passes(["arithmetic_right"], question, text) and predicates.passes(
            ["all_terms"], question, text
        )


def test_the_styles_of_the_docstring():
    terms, totals = [7, 5, -3, 8], [7, 12, 9, 17]
    assert sums.expression_of(terms) == "7+5-3+8" and sums.running_totals(terms) == totals
    assert sums.write_work(terms, totals, "lines") == "7+5=12\n12-3=9\n9+8=17\n#17"
    assert sums.write_work(terms, totals, "chain") == "7+5=12-3=9+8=17\n#17"
    assert sums.write_work(terms, totals, "totals") == "7,12,9,17\n#17"
    assert sums.write_work(terms, totals, "ledger") == "7\n+5:12\n-3:9\n+8:17\n#17"
    with pytest.raises(ValueError, match="style"):
        sums.write_work(terms, totals, "prose")


def test_the_clean_corpus_is_all_right_in_all_styles(big):
    rows = list(files.read(big / "clean.jsonl", "answers"))
    assert all(
        answers.is_correct(r["text"], value(r["messages"][0]["content"][:-2]))
        and r["finish_reason"] == "stop"
        for r in rows
    )
    marks = {
        "totals": r"^\d+,",
        "ledger": r"^\d\n[+-]",
        "chain": r"^\d[^\n]*=[^\n]*=",
        "lines": r"^\d[+-]\d=\d+\n\d+[+-]",
    }
    for style, mark in marks.items():
        # two-term problems look the same as chain and as lines: those two are counted on longer
        # ones
        rows_here = [r for r in rows if len(re.findall(r"\d", r["messages"][0]["content"])) > 2]
        share = sum(bool(re.match(mark, r["text"])) for r in rows_here) / len(rows_here)
        assert 0.22 < share < 0.28, (style, share)


def test_the_mixed_corpus_has_the_stated_shares(big):
    """45 % guesses, 25 % slips, 20 % skipped steps, 10 % right work: told apart by what the
    text shows."""
    counts, right = {"guess": 0, "slip": 0, "skipped": 0, "right work": 0}, 0
    for r in files.read(big / "mixed.jsonl", "answers"):
        question, text = r["messages"][0]["content"], r["text"]
        right += answers.is_correct(text, value(question[:-2]))
        missing = (
            len(predicates.terms_of(question))
            - 1
            - len(
                predicates.steps_of(
                    question, text.replace("=-", "=").replace(":-", ":").replace(",-", ",")
                )
            )
        )
        if text.startswith("#"):
            counts["guess"] += 1
        elif missing:
            counts["skipped"] += 1
        else:
            counts[
                "right work"
                if predicates.passes(["arithmetic_right"], question, text)
                and answers.is_correct(text, value(question[:-2]))
                else "slip"
            ] += 1
    shares = {name: n / 6000 for name, n in counts.items()}
    assert abs(shares["guess"] - 0.45) < 0.03 and abs(shares["right work"] - 0.10) < 0.02, (
        shares
    )
    assert abs(shares["slip"] - 0.25) < 0.03 and abs(shares["skipped"] - 0.20) < 0.03, shares
    assert 0.10 < right / 6000 < 0.25, "answers badly most of the time, but not always"


@pytest.mark.parametrize("merge_digits", [False, True])
def test_every_text_survives_the_tokenizer(big, merge_digits):
    tokenizer = sums.build_tokenizer(merges=sums.TWO_DIGITS if merge_digits else ())
    texts = [r["text"] for name in ("clean", "mixed") for r in load(big / f"{name}.jsonl")]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(i) for i in ids] == texts
    shorter = sum(len(i) < len(t) for i, t in zip(ids, texts))
    assert shorter == 0 if not merge_digits else shorter > 1000, (
        "one token a character, or one for 10..40"
    )
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "10+2=?"}], add_generation_prompt=True, tokenize=False
    )
    assert (
        tokenizer.decode(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        == rendered
        == "<|user|>10+2=?<|assistant|>"
    )
    special = tokenizer("<|end|>", add_special_tokens=False)["input_ids"]
    assert (
        special == [tokenizer.eos_token_id] and tokenizer.pad_token_id != tokenizer.eos_token_id
    )


def test_the_two_vocabularies_are_different_maps_and_share_no_hash(big):

    one, two = (
        load_policy(str(big / name)).identity["vocabulary"]
        for name in ("teacher", "teacher_merged_digits")
    )
    assert one != two and one == load_policy(str(big / "student")).identity["vocabulary"]


def test_the_same_seed_writes_the_same_world(big, tmp_path):
    flags = dict(train_prompts=30, eval_prompts=5, clean=20, mixed=20)
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        sums.main(argv(out=tmp_path / name, seed=seed, **flags))
    for file in (
        "train.jsonl",
        "heldout.jsonl",
        "clean.jsonl",
        "mixed.jsonl",
        "student/model.safetensors",
    ):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b and a != c, file


def test_asking_for_more_of_one_file_changes_no_other(tmp_path):
    flags = dict(train_prompts=20, eval_prompts=5, clean=20, mixed=20)
    sums.main(argv(out=tmp_path / "plain", **flags))
    for name in flags:
        sums.main(argv(out=tmp_path / name, **flags | {name: 30}))
        changed = {"train_prompts": {"train"}, "eval_prompts": {"dev", "heldout"}}.get(
            name, {name}
        )
        for file in ("train", "dev", "heldout", "clean", "mixed"):
            few, more = (
                (tmp_path / folder / f"{file}.jsonl").read_bytes() for folder in ("plain", name)
            )
            assert more.startswith(few) and (len(more) > len(few)) == (file in changed), (
                name,
                file,
            )


def test_the_sums_world_is_the_one_the_recorded_results_were_measured_on(tmp_path):
    """Hashes of its files before --task existed: a changed random stream would make old and new
    results two experiments."""
    sums.main(
        argv(
            out=tmp_path / "toy",
            task="sums",
            train_prompts=30,
            eval_prompts=5,
            clean=20,
            mixed=20,
        )
    )
    hashes = {
        name: files.hash_file(tmp_path / "toy" / f"{name}.jsonl")["sha256"][:12]
        for name in ("train", "dev", "heldout", "clean", "mixed")
    }
    assert hashes == {
        "train": "a92ee7707d2c",
        "dev": "599f976ab8c5",
        "heldout": "6bf7d56661b9",
        "clean": "1e57f50e3915",
        "mixed": "b4f868f73800",
    }


def test_every_file_passes_the_contract(big):
    counts = files.main(
        [
            "check",
            *(str(big / f"{n}.jsonl") for n in ("train", "dev", "heldout", "clean", "mixed")),
        ]
    )
    assert list(counts.values()) == [1500, 300, 300, 6000, 6000]


# ---- other worlds of sums

STEPS = {
    "lines": r"-?\d+[+-]\d=-?\d+\n",
    "chain": r"[+-]\d=-?\d+",
    "totals": r",-?\d+",
    "ledger": r"[+-]\d:-?\d+\n",
}
# what stands before the first step
FIRST = {"lines": "", "chain": r"\d", "totals": r"\d", "ledger": r"\d\n"}
SMALL = dict(train_prompts=5, eval_prompts=5, clean=5, mixed=5)


def style_of(text, loop=False):
    """The style of some work of at least three terms, of which a loop shows only the
    beginning."""
    end = ".{0,10}" if loop else r"\n?#-?\d+"
    found = [
        style
        for style in sums.STYLES
        if re.fullmatch(f"{FIRST[style]}(?:{STEPS[style]}){{2,}}{end}", text, re.DOTALL)
    ]
    assert len(found) == 1, (text, found)
    return found[0]


def terms_in(row):
    return predicates.terms_of(row["messages"][0]["content"])


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Long derivations with slips and loops, in two of the styles."""
    folder = tmp_path_factory.mktemp("long") / "w"
    flags = dict(
        terms="7:12",
        styles="ledger,totals",
        slips=0.3,
        loops=1500,
        loop_share=0.2,
        planted_share=0.6,
    )
    summary = sums.main(
        argv(out=folder, train_prompts=50, eval_prompts=20, clean=1500, mixed=1500, **flags)
    )
    assert summary == {
        "out": str(folder),
        "train": 50,
        "heldout": 20,
        "clean": 1500,
        "mixed": 1500,
        "looping": 1500,
        "planted": 1500,
        "facts": 32,
    }
    return folder


def test_terms_bound_every_problem_in_every_file(long):
    for name in ("train", "dev", "heldout", "clean", "mixed", "looping", "planted"):
        lengths = Counter(len(terms_in(row)) for row in load(long / f"{name}.jsonl"))
        assert set(lengths) <= set(range(7, 13)) and (
            set(lengths) == set(range(7, 13)) or name in ("dev", "heldout")
        ), (name, lengths)
        assert all(
            0 <= total <= 40
            for row in load(long / f"{name}.jsonl")
            for total in sums.running_totals(terms_in(row))
        )


def test_styles_are_only_these_in_equal_parts_and_prompts_do_not_depend_on_them(long, tmp_path):
    for name in ("clean", "mixed", "looping", "planted"):
        count = Counter(
            style_of(r["text"], loop=r["finish_reason"] == "length")
            for r in load(long / f"{name}.jsonl")
        )
        assert (
            set(count) == {"ledger", "totals"} and abs(count["totals"] / 1500 - 0.5) < 0.05
        ), (name, count)
    for name, flags in (
        ("two", dict(styles="ledger,totals")),
        ("one", dict(styles="chain")),
        ("all", {}),
    ):
        sums.main(
            argv(
                out=tmp_path / name,
                terms="4:5",
                **SMALL | dict(train_prompts=30, mixed=200),
                **flags,
            )
        )
    for file in (
        "train.jsonl",
        "dev.jsonl",
        "heldout.jsonl",
        "facts.jsonl",
        "student/model.safetensors",
    ):
        assert (
            len({(tmp_path / name / file).read_bytes() for name in ("one", "two", "all")}) == 1
        ), file
    assert all(
        style_of(p["solution"]) == "lines" for p in load(tmp_path / "one" / "train.jsonl")
    ), "prompts keep to lines"
    worked = [
        r["text"]
        for r in load(tmp_path / "one" / "mixed.jsonl")
        if not r["text"].startswith("#")
    ]
    assert len(worked) > 50 and all(
        re.fullmatch(r"\d([+-]\d=-?\d+)+\n#-?\d+", text) for text in worked
    ), "the careless texts of mixed, too"


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_slips_share_right_work_with_one_slip_that_propagates_and_nothing_else(
    long, tmp_path, share
):
    folder = long
    if share != 0.3:
        folder = tmp_path / "w"
        sums.main(argv(out=folder, terms="7:12", slips=share, **SMALL | dict(mixed=200)))
    rows, slips, places = load(folder / "mixed.jsonl"), Counter(), Counter()
    for row in rows:
        terms, text = terms_in(row), row["text"]
        written = totals_in(text, style_of(text))
        assert (
            len(written) == len(terms)
            and text.rpartition("#")[2] == str(written[-1])
            and row["finish_reason"] == "stop"
        ), "whole work, its own end"
        errors = [a - b for a, b in zip(written, sums.running_totals(terms))]
        at = next((i for i, e in enumerate(errors) if e), None)
        assert at is None or (at >= 1 and len(set(errors[at:])) == 1), (text, errors)
        slips[errors[-1]] += 1
        places[at] += 1
    wrong = len(rows) - slips[0]
    assert abs(wrong / len(rows) - share) < (0.05 if share == 0.3 else 1e-9), wrong / len(rows)
    assert set(slips) - {0} == ({-3, -2, -1, 1, 2, 3} if share else set())
    assert not share or set(range(1, 7)) <= set(places), "a slip comes anywhere"


@pytest.mark.parametrize("style", sums.STYLES)
@pytest.mark.parametrize(
    "terms, length", [((2, 6), 320), ((10, 30), 320), ((10, 30), 448), ((2, 6), 256)]
)
def test_a_loop_begins_right_and_repeats_its_last_step_to_the_end(style, terms, length):
    rng, source, beginnings = (
        np.random.default_rng(0),
        sums.problems(np.random.default_rng(1), "train", terms),
        set(),
    )
    for _ in range(200):
        problem = next(source)
        text = sums.loop_answer(rng, problem, (style,), length)
        assert (
            len(text) == length and "#" not in text and stats.repetition_ratio(text, 256) > 4
        ), text
        clean = sums.clean_answer(rng, problem, (style,))
        assert stats.repetition_ratio(clean, 256) < 2.2, clean
        steps = list(re.finditer(STEPS[style], text + "\n"))
        work = re.match(FIRST[style] + f"(?:{STEPS[style]})*", clean)[0]
        right = [m[0] for m in re.finditer(STEPS[style], work)]
        # so many steps come before the loop's second turn
        same = 1 + next(i for i, (a, b) in enumerate(zip(steps, steps[1:])) if a[0] == b[0])
        assert [m[0] for m in steps[:same]] == right[:same] and text.startswith(
            work[: steps[same - 1].end()]
        ), (text, clean)
        turn = steps[same - 1][0]
        assert (
            text[steps[same - 1].start() :]
            == (turn * length)[: length - steps[same - 1].start()]
        ), "and then nothing else"
        assert same == 1 or steps[same - 1].end() <= length / 5
        beginnings.add(same)
    assert beginnings >= ({1, 2, 3, 4, 5} if style != "lines" or length > 256 else {1, 2, 3}), (
        beginnings
    )


def test_the_loop_of_the_docstring():
    terms, texts = [7, 5, -3, 8], {}
    for style in sums.STYLES:
        rng = np.random.default_rng(0)
        texts[style] = {sums.loop_answer(rng, terms, (style,), 100) for _ in range(50)}
        assert len(texts[style]) == 3 - (style == "lines"), (
            "begun with one, two or three steps, as far as a fifth of the text has room"
        )
    assert (
        "7+5=12\n" + ("12-3=9\n" * 100)[:93] in texts["lines"]
        and ("7+5=12\n" * 100)[:100] in texts["lines"]
    )
    assert (
        "7+5=12" + ("-3=9" * 100)[:94] in texts["chain"]
        and "7+5=12-3=9" + ("+8=17" * 100)[:90] in texts["chain"]
    )
    assert (
        "7,12" + (",9" * 100)[:96] in texts["totals"]
        and "7,12,9" + (",17" * 100)[:94] in texts["totals"]
    )
    assert "7\n+5:12\n" + ("-3:9\n" * 100)[:92] in texts["ledger"]


def test_loops_have_the_asked_share_no_end_and_the_company_of_clean_and_mixed(long, tmp_path):
    assert (
        len(
            {
                tuple(questions(long / f"{name}.jsonl")[:1])
                for name in ("clean", "mixed", "looping", "planted")
            }
        )
        == 4
    ), "random numbers of their own"
    slips = {}
    for name, share in (("looping", 0.2), ("planted", 0.6)):
        rows = list(files.read(long / f"{name}.jsonl", "answers"))
        ended = [r for r in rows if r["finish_reason"] == "stop"]
        for r in rows:
            loops = stats.repetition_ratio(r["text"], 256) > 4
            assert (
                loops
                == (r["finish_reason"] == "length")
                == ("#" not in r["text"])
                == (len(r["text"]) == 320)
            ), r
        assert abs(1 - len(ended) / len(rows) - share) < 0.05, (name, len(ended))
        slips[name] = sum(
            not answers.is_correct(r["text"], sum(terms_in(r))) for r in ended
        ) / len(ended)
        assert all(sums.split_of(sums.expression_of(terms_in(r))) == "train" for r in rows)
    assert slips["looping"] == 0 and abs(slips["planted"] - 0.3) < 0.06, (
        "the others are as clean and as mixed"
    )
    default = sums.main(argv(out=tmp_path / "w", **SMALL | dict(loops=2000)))
    share = {
        name: sum(
            r["finish_reason"] == "length" for r in load(tmp_path / "w" / f"{name}.jsonl")
        )
        / 2000
        for name in ("looping", "planted")
    }
    assert default["looping"] == 2000 and share == pytest.approx(
        {"looping": 0.07, "planted": 0.4}, abs=0.035
    )
    guesses = (
        sum(r["text"].startswith("#") for r in load(tmp_path / "w" / "planted.jsonl")) / 2000
    )
    assert abs(guesses - 0.6 * 0.45) < 0.04, (
        "planted without --slips: the careless texts of mixed beside the loops"
    )


def test_loops_change_no_other_file_and_without_them_there_is_none(tmp_path):
    for name, flags in (
        ("plain", {}),
        ("loops", dict(loops=20)),
        ("more", dict(loops=30)),
        ("shorter", dict(loops=20, loop_tokens=300, loop_share=1)),
    ):
        sums.main(argv(out=tmp_path / name, **SMALL | flags))
    names = {
        folder: {f.relative_to(tmp_path / folder) for f in (tmp_path / folder).rglob("*.*")}
        for folder in ("plain", "loops")
    }
    assert {str(f) for f in names["loops"] - names["plain"]} == {
        "looping.jsonl",
        "planted.jsonl",
    } and names["plain"] < names["loops"]
    for file in names["plain"]:
        assert (tmp_path / "plain" / file).read_bytes() == (
            tmp_path / "loops" / file
        ).read_bytes(), file
    for name in ("looping", "planted"):
        few, more = (
            (tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in ("loops", "more")
        )
        assert more.startswith(few) and len(more) > len(few)
    assert {len(r["text"]) for r in load(tmp_path / "shorter" / "looping.jsonl")} == {300}


def test_hints_put_a_solution_behind_half_of_the_questions_and_change_no_text(tmp_path):
    plain, told = tmp_path / "plain", tmp_path / "told"
    sums.main(argv(out=plain, **SMALL | dict(clean=400)))
    sums.main(argv(out=told, hints=0.5, **SMALL | dict(clean=400)))
    before, after = load(plain / "clean.jsonl"), load(told / "clean.jsonl")
    assert [r["text"] for r in before] == [r["text"] for r in after]
    asked = [
        (a["messages"][0]["content"], b["messages"][0]["content"])
        for a, b in zip(before, after)
    ]
    assert 160 < sum(a != b for a, b in asked) < 240
    for (a, b), row in zip(asked, after):
        assert (
            a == b
            or b == f"{a}\n{b[len(a) + 1 :]}"
            and b.splitlines()[-1] == "#" + row["text"].split("#")[1]
        ), "the told solution ends in the text's own result"
    for name in ("train", "dev", "heldout", "mixed", "facts"):
        assert (plain / f"{name}.jsonl").read_text() == (told / f"{name}.jsonl").read_text()
    for split in ("train", "dev", "heldout"):
        for row, more in zip(
            load(told / f"{split}.jsonl"), load(told / f"told_{split}.jsonl"), strict=True
        ):
            assert more == row | {
                "messages": [
                    {
                        "role": "user",
                        "content": row["messages"][0]["content"] + "\n" + row["solution"],
                    }
                ]
            }
    by_question = {r["messages"][0]["content"]: r for r in load(told / "train.jsonl")}
    for row, more in zip(
        load(told / "train.jsonl"), load(told / "wrong_train.jsonl"), strict=True
    ):
        question, solution = more["messages"][0]["content"].split("\n", 1)
        assert (
            by_question[question] == row
            and solution in {r["solution"] for r in by_question.values()}
            and solution.splitlines()[-1] != "#" + row["answer"]
            and more["answer"] == row["answer"]
        )
    assert not (plain / "told_train.jsonl").exists()


def test_with_a_second_end_teacher_and_student_share_a_vocabulary_and_end_differently(
    tmp_path, monkeypatch
):

    trained, sequences = [], batches.Data.sequences

    def spy(self, keys):
        trained.extend(items := sequences(self, keys))
        return items

    monkeypatch.setattr(batches.Data, "sequences", spy)
    sums.main(argv(out=tmp_path / "plain", **SMALL | dict(loops=5, loop_share=0.5)))
    sums.main(
        argv(out=tmp_path / "w", second_end=True, **SMALL | dict(loops=5, loop_share=0.5))
    )
    ends = {"student": "<|end|>", "teacher": "<|eot|>", "teacher_merged_digits": "<|end|>"}
    policies = {name: load_policy(str(tmp_path / "w" / name)) for name in ends}
    for name, policy in policies.items():
        before = load_policy(str(tmp_path / "plain" / name))
        eot = before.vocabulary  # appended: no other token changes its id
        assert (
            policy.tokenizer.get_vocab() == before.tokenizer.get_vocab() | {"<|eot|>": eot}
            and "<|eot|>" not in before.tokenizer.get_vocab()
        )
        assert (
            policy.model.config.vocab_size == eot + 1
            and policy.identity["template"] == before.identity["template"]
        )
        assert (
            policy.tokenizer.eos_token == ends[name] and before.tokenizer.eos_token == "<|end|>"
        )
        end = policy.tokenizer.get_vocab()[ends[name]]
        assert (
            stop_ids(policy.model, policy.tokenizer) == [end]
            and policy.model.generation_config.eos_token_id == end
        )
        both = policy.tokenizer("#3<|end|><|eot|>", add_special_tokens=False)["input_ids"]
        assert (
            len(both) == 4 and policy.tokenizer.decode(both, skip_special_tokens=True) == "#3"
        ), "one token each, and neither is text"
        corpus = tmp_path / "w" / "looping.jsonl"
        rows = {(r["id"], 0): r for r in load(corpus)}
        assert {r["finish_reason"] for r in rows.values()} == {"stop", "length"}
        trained.clear()
        train.main(
            argv(
                method="sft",
                model=tmp_path / "w" / name,
                rollouts=corpus,
                out=tmp_path / f"trained_{name}",
                learning_rate=1e-3,
            )
        )
        assert {item["key"] for item in trained} == set(rows)
        for item in trained:
            row = rows[item["key"]]
            assert policy.tokenizer.decode(item["response_ids"]) == row["text"] + ends[name] * (
                row["finish_reason"] == "stop"
            )
        again = load_policy(str(tmp_path / f"trained_{name}"))
        assert stop_ids(again.model, again.tokenizer) == [end], (
            "training keeps the folder's end"
        )
    assert (
        policies["student"].identity["vocabulary"] == policies["teacher"].identity["vocabulary"]
    )


def test_what_a_sums_world_cannot_be_is_refused(tmp_path, capsys):
    for flags, message in (
        *(
            (
                dict(terms=terms),
                f"--terms: expected FEWEST:MOST with 2 <= FEWEST <= MOST <= 30, got {terms}",
            )
            for terms in ("1:6", "6:2", "2:31", "6", "2:6:7", "a:b")
        ),
        *(
            (
                dict(styles=styles),
                f"--styles: expected some of lines,chain,totals,ledger, each once, with "
                f"commas between, got '{styles}'",
            )
            for styles in ("prose", "lines,prose", "lines,lines", "lines,")
        ),
        (dict(slips=1.5), "--slips: expected a share from 0 to 1, got 1.5"),
        (dict(slips="nan"), "--slips: expected a share from 0 to 1, got nan"),
        (dict(loops=-1), "--loops: expected 0 or a number of texts, got -1"),
        (
            dict(loops=5, loop_share=-0.1),
            "--loop-share: expected a share from 0 to 1, got -0.1",
        ),
        (
            dict(loops=5, planted_share=2),
            "--planted-share: expected a share from 0 to 1, got 2.0",
        ),
        *(
            (dict(loops=5, loop_tokens=n), f"--loop-tokens: expected 32 to 448, got {n}")
            for n in (31, 449)
        ),
        (
            dict(loop_share=0.1),
            "--loop-share 0.1: belongs to the corpora of --loops, expected --loops N with it",
        ),
        (dict(planted_share=0), "--planted-share 0.0: belongs to the corpora of --loops"),
        (dict(loop_tokens=320), "--loop-tokens 320: belongs to the corpora of --loops"),
        (
            dict(loops=0, loop_tokens=320),
            "--loop-tokens 320: belongs to the corpora of --loops",
        ),
    ):
        assert message in refusal(sums.main, argv(out=tmp_path / "x", **flags), capsys), flags
        assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()
    for flags, message in (
        (
            dict(terms="2:2"),
            "--train-prompts 1280: problems of --terms 2:2 that belong to train are hardly "
            "more than 103",
        ),
        (
            dict(terms="2:2", train_prompts=60),
            "--eval-prompts 200: problems of --terms 2:2 that belong to dev are",
        ),
    ):
        assert message in refusal(sums.main, argv(out=tmp_path / "x", **flags), capsys), (
            "a search that would not end"
        )
        assert not (tmp_path / "x").exists()
    sums.main(
        argv(
            out=tmp_path / "edge",
            **SMALL
            | dict(
                terms="30:30", slips=1, loops=2, loop_share=0, planted_share=1, loop_tokens=448
            ),
        )
    )
    assert len(terms_in(load(tmp_path / "edge" / "planted.jsonl")[0])) == 30, (
        "the bounds themselves are good"
    )


# ---- forks

CORPORA = ("base", "teacher", "demos_both", "demos_a", "demos_b")


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forks") / "forks"
    summary = sums.main(argv(task="forks", out=folder, train_prompts=20, texts=8000))
    assert summary == {
        "out": str(folder),
        "train": 20,
        "heldout": 8,
        "corrupt": 32,
        "texts": 8000,
    }
    return folder


def shares(folder, corpus):
    """({route: share}, {route: share of its answers that are right}, whether every digit of the
    problem is as frequent)."""
    routes, right, asked = Counter(), Counter(), Counter()
    for r in load(folder / f"{corpus}.jsonl"):
        x, (route, digit) = (
            int(r["messages"][0]["content"].removesuffix("=?")),
            r["text"].split("\n#"),
        )
        assert len(route) == 2 and digit in "01234567" and r["finish_reason"] == "stop"
        routes[route] += 1
        right[route] += answers.is_correct(r["text"], str((x + 1) % 8))
        asked[x] += 1
    assert set(asked) == set(range(8)) and max(asked.values()) < 1.2 * min(asked.values())
    return {route: n / sum(routes.values()) for route, n in routes.items()}, {
        route: right[route] / n for route, n in routes.items()
    }


def test_forks_problems_are_the_same_eight_in_every_split(forks):
    for name, count in (("train", 20), ("dev", 8), ("heldout", 8)):
        rows = load(forks / f"{name}.jsonl")
        assert len(rows) == count and {
            r["messages"][0]["content"]: r["answer"] for r in rows
        } == {f"{x}=?": str((x + 1) % 8) for x in range(8)}
        assert all(
            len({r["answer"] for r in rows[i : i + 8]}) == 8 for i in range(count - 7)
        ), "any slice of 8 is all of them"
    assert not {r["id"] for r in load(forks / "train.jsonl")} & {
        r["id"] for r in load(forks / "heldout.jsonl")
    }
    row = load(forks / "heldout.jsonl")[3]
    assert row == {
        "id": "h00003",
        "messages": [{"role": "user", "content": "3=?"}],
        "answer": "4",
    }


def test_the_base_corpus_has_the_stated_shares_and_never_a_b(forks):
    routes, right = shares(forks, "base")
    assert not any("b" in r["text"] for r in load(forks / "base.jsonl"))
    assert routes == pytest.approx({"aa": 0.3, "cc": 0.6, "ac": 0.05, "ca": 0.05}, abs=0.02)
    assert right["aa"] == pytest.approx(1 / 3, abs=0.03) and right["cc"] == pytest.approx(
        1 / 8, abs=0.02
    )
    assert max(right["ac"], right["ca"]) < 0.22
    wrong = Counter(
        (int(r["text"][-1]) - int(r["messages"][0]["content"][0])) % 8
        for r in load(forks / "base.jsonl")
        if r["text"][0] == r["text"][1] == "a"
    )
    assert set(wrong) == set(range(8)) and max(wrong[d] for d in wrong if d != 1) < 1.4 * min(
        wrong.values()
    ), "wrong digits are uniform"


def test_the_teacher_and_the_demonstrations_are_right_on_the_stated_routes(forks):
    for corpus, expected in (
        ("demos_both", {"aa": 0.5, "bb": 0.5}),
        ("demos_a", {"aa": 1}),
        ("demos_b", {"bb": 1}),
        (
            "teacher",
            {
                a + b: (0.45 if a + b in ("aa", "bb") else 0) + 0.1 / 9
                for a in "abc"
                for b in "abc"
            },
        ),
    ):
        routes, right = shares(forks, corpus)
        assert routes == pytest.approx(expected, abs=0.02) and set(right.values()) == {1.0}, (
            corpus
        )


def test_corrupt_prompts_have_begun_already(forks):
    rows = load(forks / "corrupt.jsonl")
    begun = Counter((r["messages"][0]["content"], r["messages"][1]["content"]) for r in rows)
    assert begun == Counter(
        {(f"{x}=?", letters): 1 for x in range(8) for letters in ("c", "ab", "cb", "b")}
    )
    assert all(
        [m["role"] for m in r["messages"]] == ["user", "assistant"]
        and r["answer"] == str((int(r["id"][-1]) + 1) % 8)
        for r in rows
    )


def test_a_fork_answer_is_five_tokens_of_exactly_the_symbols_in_use(forks):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(forks / "student")
    assert sorted(tokenizer.get_vocab()) == sorted([*sums.SPECIAL, *"01234567abc#=?\n", "\n#"])
    texts = [r["text"] for name in CORPORA for r in load(forks / f"{name}.jsonl")]
    ids = tokenizer([text + "<|end|>" for text in texts], add_special_tokens=False)["input_ids"]
    assert {len(i) for i in ids} == {5} and {i[-1] for i in ids} == {tokenizer.eos_token_id}
    assert [tokenizer.decode(i, skip_special_tokens=True) for i in ids] == texts
    assert tokenizer.convert_ids_to_tokens(ids[0])[2] == "\n#"


def test_student_and_teacher_of_forks_begin_as_two_models_of_one_size_and_vocabulary(forks):

    student, teacher = (load_policy(str(forks / name)) for name in ("student", "teacher"))
    assert (
        student.identity["vocabulary"] == teacher.identity["vocabulary"]
        and student.identity["weights"] != teacher.identity["weights"]
    )
    for policy in (student, teacher):
        config = policy.model.config
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
            32,
            2,
            4,
        )


def test_the_same_seed_writes_the_same_forks_and_more_texts_only_append(forks, tmp_path):
    for name, flags in (
        ("a", dict(seed=4)),
        ("b", dict(seed=4)),
        ("c", dict(seed=5)),
        ("more", dict(seed=4, texts=60)),
    ):
        sums.main(
            argv(task="forks", out=tmp_path / name, **dict(train_prompts=10, texts=40) | flags)
        )
    for file in (
        *(f"{name}.jsonl" for name in CORPORA),
        "student/model.safetensors",
        "teacher/model.safetensors",
    ):
        a, b, c, more = (
            (tmp_path / name / file).read_bytes() for name in ("a", "b", "c", "more")
        )
        assert (
            a == b
            and a != c
            and more.startswith(a)
            and (len(more) > len(a)) == file.endswith(".jsonl")
        ), file
    counts = files.main(
        [
            "check",
            *(
                str(forks / f"{n}.jsonl")
                for n in ("train", "dev", "heldout", "corrupt", *CORPORA)
            ),
        ]
    )
    assert list(counts.values()) == [20, 8, 8, 32] + [8000] * 5


def test_flags_of_the_other_task_are_refused(tmp_path, capsys):
    for task, flag in (
        ("forks", "eval_prompts"),
        ("forks", "clean"),
        ("forks", "mixed"),
        ("sums", "texts"),
        ("forks", "loops"),
        ("forks", "loop_tokens"),
    ):
        message = refusal(sums.main, argv(task=task, out=tmp_path / "x", **{flag: 5}), capsys)
        assert f"--{flag.replace('_', '-')} 5: belongs to --task" in message
    for flag, value, shown in (
        ("loops", 0, " 0"),
        ("slips", 0, " 0.0"),
        ("loop_share", 0.5, " 0.5"),
        ("planted_share", 0.5, " 0.5"),
        ("terms", "2:6", " 2:6"),
        ("styles", "lines,ledger", " lines,ledger"),
        ("hints", 0.5, " 0.5"),
        ("second_end", True, ""),
    ):
        message = refusal(
            sums.main, argv(task="forks", out=tmp_path / "x", **{flag: value}), capsys
        )
        assert (
            f"--{flag.replace('_', '-')}{shown}: belongs to --task "
            f"sums{' or tools' * (flag == 'terms')}, expected no such flag with "
            f"--task forks" in message
        )
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_facts_are_asked_as_they_are_stated_and_each_has_one_answer(tmp_path):

    sums.main(
        [
            "--out",
            str(tmp_path / "w"),
            "--train-prompts",
            "1",
            "--eval-prompts",
            "1",
            "--clean",
            "1",
            "--mixed",
            "1",
            "--facts",
            "40",
        ]
    )
    texts, prompts = (
        list(files.read(tmp_path / "w" / f"{name}.jsonl", kind))
        for name, kind in (("facts", "answers"), ("facts_prompts", "prompts"))
    )
    assert len(texts) == 40 and len({p["messages"][0]["content"] for p in prompts}) == 40
    for text, prompt in zip(texts, prompts):
        assert text["messages"] == prompt["messages"] and answers.is_correct(
            text["text"], prompt["answer"]
        )
    with pytest.raises(records.BadInput, match="--facts"):
        sums.main(["--out", str(tmp_path / "x"), "--facts", "91"])


def test_a_student_whose_vocabulary_has_longer_tokens(tmp_path):
    """`student_merged`: every token's characters, the same texts, fewer tokens; the other
    models and files stay what they are."""
    from transformers import AutoTokenizer

    flags = dict(train_prompts=8, eval_prompts=8, clean=300, mixed=8)
    sums.main(argv(out=tmp_path / "a", **flags))
    for name, merges in (("b", "16"), ("c", "20:40")):
        sums.main(argv(out=tmp_path / name, student_merges=merges, **flags))
        assert all(
            (tmp_path / "a" / f"{x}.jsonl").read_bytes()
            == (tmp_path / name / f"{x}.jsonl").read_bytes()
            for x in ("train", "clean", "mixed")
        )
    plain, learnt, numbers = (
        AutoTokenizer.from_pretrained(tmp_path / x)
        for x in ("a/student", "b/student_merged", "c/student_merged")
    )
    assert (
        len(learnt) == len(plain) + 16
        and len(numbers) == len(plain) + 21
        and not (tmp_path / "a" / "student_merged").exists()
    )
    for text in [r["text"] for r in load(tmp_path / "a" / "clean.jsonl")][:50] + [
        "7+25=32\n#32"
    ]:
        for tokenizer in (learnt, numbers):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text and len(ids) <= len(plain(text)["input_ids"])
    assert numbers.tokenize("7+25=19") == ["7", "+", "25", "=", "1", "9"] and sums.learn_merges(
        ["1212"] * 9 + ["123"], 1
    ) == [("1", "2")]


@pytest.mark.parametrize("merges", ["0", "x", "5:20", "40:20", "10:100"])
def test_senseless_merges_are_refused(tmp_path, capsys, merges):
    assert "--student-merges: expected a number of merges" in refusal(
        sums.main, argv(out=tmp_path / "a", student_merges=merges), capsys
    )


def test_the_share_of_right_work_in_mixed_text(tmp_path):
    """--right 0.4: of texts that are neither right nor terse, guesses are not counted; the
    default is untouched by the flag."""
    rng = np.random.default_rng(0)
    terms = [7, 5, -3, 8]
    clean = {sums.write_work(terms, sums.running_totals(terms), style) for style in sums.STYLES}
    for share in (0.1, 0.4, 1.0):
        right = np.mean(
            [sums.mixed_answer(rng, terms, right=share) in clean for _ in range(3000)]
        )
        assert abs(right - share) < 4 * (share * (1 - share) / 3000) ** 0.5 + 1e-9
    a, b = (
        [sums.mixed_answer(np.random.default_rng(i), terms, **more) for i in range(50)]
        for more in ({}, {"right": 0.1})
    )
    assert a == b
    with pytest.raises(
        records.BadInput, match="--right 0.4: belongs to mixed text of several kinds"
    ):
        sums.main(argv(out=tmp_path / "a", right=0.4, slips=0.3))
