"""The discriminator: its loss by autograd, its gradient and its scores by plain transformers in
float64, its blindness where it must be blind."""

import itertools
import math
import types

import numpy as np
import pytest
import torch
from conftest import argv, by_key, dump, load, refusal, variant

import rollout
import teacher
import train
from methods import gad
from methods.explain import explain
from methods.gad import load_scorer, pair_weights, verdicts
from opd import loss as losses
from opd import policy as policies
from opd import records

END = 4


# ---- the loss


@pytest.mark.parametrize("kind", ["bradley-terry", "cross-entropy"])
@pytest.mark.parametrize(
    "given, own",
    [
        ([0.3], [0.1, -0.7, 2.0]),
        ([1.0, -0.5], [0.2, 0.4, 0.9]),
        ([0.0, 1.0, 2.0], [5.0]),
        ([40.0], [-40.0]),
        ([-800.0], [800.0]),
    ],
)
def test_the_weights_are_the_gradient_of_the_loss(kind, given, own):
    t, s = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (given, own))
    pairs = [(t[i % len(given)], s[i]) for i in range(len(own))]
    if kind == "bradley-terry":
        values = [torch.nn.functional.softplus(b - a) for a, b in pairs]
    else:
        values = [
            torch.nn.functional.softplus(-a) + torch.nn.functional.softplus(b) for a, b in pairs
        ]
    sum(values).backward()
    up, down, losses_ = pair_weights(kind, given, own)
    assert losses_ == pytest.approx([v.item() for v in values], abs=1e-12)
    assert [*up, *down] == pytest.approx((-torch.cat([t.grad, s.grad])).tolist(), abs=1e-12)


def test_verdicts_by_hand():
    """Two questions: margins 1, 0 (a tie), -1; 2.  Lengths centred: -1, 0, 1 and 0; scores
    centred: -1, 0, 1 and 0: correlation 1."""
    got = verdicts([([1.0], [0.0, 1.0, 2.0], [5, 6, 7]), ([3.0], [1.0], [50])])
    assert got == pytest.approx(
        {
            "accuracy": (1 + 0.5 + 0 + 1) / 4,
            "margin": (1 + 0 - 1 + 2) / 4,
            "length_correlation": 1.0,
            "score_std": math.sqrt(2 / 3) / 2,
        }
    )
    assert "accuracy" not in verdicts([([], [0.0, 1.0], [5, 3])]) and verdicts(
        [([], [0.0, 1.0], [5, 3])]
    )["length_correlation"] == pytest.approx(-1)
    assert verdicts([([], [1.0, 1.0], [5, 3])])["length_correlation"] == 0.0


# ---- one step


@pytest.fixture(scope="module")
def pairs(world, tmp_path_factory):
    """Answers of the teacher to the prompts of the world's rollouts, two each, one of them cut;
    and a discriminator after two steps."""
    root = tmp_path_factory.mktemp("pairs")
    teacher.main(
        argv(
            "answer",
            model=world.teacher,
            prompts=world.prompts,
            slice=":8",
            n=2,
            max_tokens=28,
            out=root / "a.jsonl",
        )
    )
    train.main(
        argv(
            method="discriminator",
            model=world.base,
            rollouts=world.rollouts,
            data=root / "a.jsonl",
            out=root / "d",
            batch_size=4,
            learning_rate=1e-2,
        )
    )
    return types.SimpleNamespace(root=root, answers=root / "a.jsonl", d=root / "d")


def naive_score(model, ids):
    """D of one unpadded sequence, from plain transformers."""
    return (
        model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        @ model.score.weight[0]
    )


def naive_discriminator(folder):
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float64
    ).eval()


class Recorder:
    def __init__(self, masters):
        self.masters = masters

    def step(self):
        self.gradient = torch.cat(
            [m.grad.double().flatten() for m in self.masters if m.grad is not None]
        )

    def zero_grad(self):
        for m in self.masters:
            m.grad = None


def one_step(rollouts, answers, model, micro=8192, overrides=()):
    """(flat gradient, metrics) of one step on all pairs, as train.py takes it."""
    method = losses.settings("discriminator", overrides)
    args = types.SimpleNamespace(
        method="discriminator",
        model=str(model),
        rollouts=rollouts,
        data=answers,
        rewards=None,
        scores=None,
        reference=None,
        prompts=None,
        data_scores=None,
        token_weights=None,
        tail=256,
        threshold=4.0,
        allow_stale=False,
        grad_clip=0.0,
        micro_batch_tokens=micro,
        kernel="auto",
        teacher_top_k=None,
    )
    scorer = load_scorer(str(model), view=method.view, seed=0)
    data, given = train.Data(args, method, scorer), train.Data(args, method, scorer, given=True)
    keys = list(data.groups)
    recorder = Recorder([p.requires_grad_() for p in scorer.model.parameters()])
    numbers = train.optimise(
        scorer,
        data,
        data.sequences([k for p in keys for k in data.groups[p]]),
        recorder.masters,
        recorder,
        args,
        (given, given.sequences([k for p in keys for k in given.groups[p]])),
    )
    return recorder.gradient, numbers


@pytest.mark.parametrize("kind", ["bradley-terry", "cross-entropy"])
def test_the_gradient_of_a_step_is_that_of_the_mean_over_pairs(world, pairs, kind):
    """Every own answer with a given one in turn; one sequence at a time, float64, no padding,
    through plain transformers."""
    model, own, given = naive_discriminator(pairs.d), load(world.rollouts), load(pairs.answers)
    total, count = 0.0, 0
    for prompt in sorted({r["id"] for r in own}):
        s = [
            naive_score(model, r["prompt_ids"] + r["response_ids"])
            for r in own
            if r["id"] == prompt
        ]
        t = [
            naive_score(model, r["prompt_ids"] + r["response_ids"])
            for r in given
            if r["id"] == prompt
        ]
        for i, x in enumerate(s):
            y, count = t[i % len(t)], count + 1
            total = total + (
                -torch.nn.functional.logsigmoid(y - x)
                if kind == "bradley-terry"
                else -torch.nn.functional.logsigmoid(y) - torch.nn.functional.logsigmoid(-x)
            )
    (total / count).backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    got, numbers = one_step(
        world.rollouts, pairs.answers, pairs.d, overrides=(f"omega={kind}",)
    )
    assert float((got - want).norm() / want.norm()) < 2e-5 and numbers[
        "train/loss"
    ] == pytest.approx(total.item() / count, rel=1e-5)
    assert numbers["train/sequences"] == len(own) + len(given) and numbers[
        "train/tokens"
    ] == sum(len(r["response_ids"]) for r in own + given)


def test_micro_batches_and_padding_change_nothing(world, pairs):
    whole, numbers = one_step(world.rollouts, pairs.answers, pairs.d)
    for micro in (1, 90):
        part, other = one_step(world.rollouts, pairs.answers, pairs.d, micro)
        assert float((part - whole).norm() / whole.norm()) < 1e-5 and other == pytest.approx(
            numbers, rel=1e-4, abs=1e-6
        )


def test_a_text_only_answer_is_the_same_answer(world, pairs, tmp_path):
    """A black box returns no tokens: its text, with an end token iff it ended by itself, gives
    the very gradient of the ids."""
    questions, tokenizer = (
        {p["id"]: p["messages"] for p in load(world.prompts)},
        policies.load_tokenizer(str(world.base)),
    )
    # no <|user|> in its midst
    spelt = [
        a
        for a in load(pairs.answers)
        if tokenizer(a["text"])["input_ids"] + [END] * (a["finish_reason"] == "stop")
        == a["response_ids"]
    ]
    bare = [
        {k: a[k] for k in ("id", "sample", "text", "finish_reason")}
        | {"policy": {"model": "somebody"}, "messages": questions[a["id"]]}
        for a in spelt
    ]
    assert {"stop", "length"} == {a["finish_reason"] for a in bare} and len(bare) > 4, (
        "both kinds of ending are in the test"
    )
    own = dump(
        tmp_path / "own.jsonl",
        [r for r in load(world.rollouts) if r["id"] in {a["id"] for a in bare}],
    )
    got, _ = one_step(own, dump(tmp_path / "bare.jsonl", bare), pairs.d)
    want, _ = one_step(own, dump(tmp_path / "ids.jsonl", spelt), pairs.d)
    assert torch.equal(got, want)


# ---- folders


def test_a_first_discriminator_is_the_policy_with_a_seeded_head(world):
    heads = [load_scorer(str(world.base), seed=seed) for seed in (0, 0, 1)]
    assert (
        torch.equal(heads[0].head, heads[1].head)
        and not torch.equal(heads[0].head, heads[2].head)
        and heads[0].head.shape == (1, 64)
    )
    assert float(heads[0].head.std()) < 0.05
    own = policies.load_policy(str(world.base)).model.model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in heads[0].model.model.state_dict().items())


def test_the_folder_is_a_transformers_classifier_and_goes_on(world, pairs, tmp_path):
    model = naive_discriminator(pairs.d)
    r = next(r for r in load(world.rollouts) if r["response_ids"][-1] == END)
    ids = r["prompt_ids"] + r["response_ids"]
    with torch.no_grad():  # no padding in sight, so transformers reads the score where we do
        assert float(model(input_ids=torch.tensor([ids])).logits[0, 0]) == pytest.approx(
            float(naive_score(model, ids)), abs=1e-9
        )
    done = train.main(
        argv(
            method="discriminator",
            model=pairs.d,
            rollouts=world.rollouts,
            data=pairs.answers,
            out=tmp_path / "d2",
            batch_size=4,
            learning_rate=1e-2,
        )
    )
    assert done["steps"] == 2 and done["step"] == 4, "optimiser and step count go on"
    first = load(pairs.d / "metrics.jsonl")[0]
    last = load(tmp_path / "d2" / "metrics.jsonl")[-1]
    assert last["train/loss"] < first["train/loss"], "it has learnt from these pairs"


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(data=None), "expected --data FILE, but it is missing"),
        (dict(set="omega=one"), "coefficient score: goes with omega"),
        (dict(set="norm=token"), "coefficient score: goes with"),
        (dict(set="view=size"), "view: expected one of text, length"),
        (dict(set="entropy_bonus=0.1"), "a discriminator has no tokens"),
        (dict(set="reference_kl=0.1"), "reference_kl"),
    ],
)
def test_what_makes_no_sense_is_refused(world, pairs, tmp_path, capsys, flags, message):
    flags = dict(
        dict(
            method="discriminator",
            model=world.base,
            rollouts=world.rollouts,
            data=pairs.answers,
            out=tmp_path / "d",
        ),
        **flags,
    )
    assert message in refusal(train.main, argv(**flags), capsys)


def test_view_and_omega_belong_to_discriminators(capsys):
    for overrides in (["view=length"], ["omega=bradley-terry"], ["coefficient=score"]):
        with pytest.raises(records.BadInput, match="score"):
            losses.settings("grpo", overrides)


def test_explain_shows_a_pair_by_hand():
    """Margins 0.2 - 0.5 and 0.2 + 0.1: the pull is sigmoid(0.3) / 2 and sigmoid(-0.3) / 2."""
    text = explain("discriminator")
    a, b = 1 / (1 + math.exp(-0.3)) / 2, 1 / (1 + math.exp(0.3)) / 2
    assert (
        f"given {a + b:+.4f}, own {-a:+.4f} and {-b:+.4f}" in text
        and "--data (given answers" in text
    )
    assert f"given {1 / (1 + math.exp(0.2)):+.4f}" in explain(
        "discriminator", ["omega=cross-entropy"]
    )


# ---- grading


def grade(world, pairs, out, **flags):
    return gad.main(
        argv(
            "grade",
            **dict(
                dict(
                    discriminator=pairs.d,
                    rollouts=world.rollouts,
                    out=out,
                ),
                **flags,
            ),
        )
    )


def test_rewards_are_the_scores_and_name_the_discriminator(world, pairs, tmp_path):
    done = grade(world, pairs, tmp_path / "w.jsonl", answers=pairs.answers)
    model, rewards = naive_discriminator(pairs.d), by_key(load(tmp_path / "w.jsonl"))
    with torch.no_grad():
        want = {
            (r["id"], r["sample"]): float(
                naive_score(model, r["prompt_ids"] + r["response_ids"])
            )
            for r in load(world.rollouts)
        }
        given = {}
        for a in load(pairs.answers):
            given.setdefault(a["id"], []).append(
                float(naive_score(model, a["prompt_ids"] + a["response_ids"]))
            )
    assert {k: r["reward"] for k, r in rewards.items()} == pytest.approx(
        want, abs=1e-4
    ) and any(not 0 <= x <= 1 for x in want.values())
    assert {r["discriminator"] for r in rewards.values()} == {policies.hash_weights(pairs.d)}
    hits = [(t > s) + 0.5 * (t == s) for (prompt, _), s in want.items() for t in given[prompt]]
    assert done["accuracy"] == pytest.approx(np.mean(hits), abs=0.02) and done[
        "margin"
    ] == pytest.approx(
        np.mean([t - s for (p, _), s in want.items() for t in given[p]]), abs=1e-4
    )
    trained = train.main(
        argv(
            method="gad",
            model=world.base,
            rollouts=world.rollouts,
            rewards=tmp_path / "w.jsonl",
            reference=world.scores,
            out=tmp_path / "m",
            learning_rate=1e-3,
        )
    )
    assert trained["steps"] == 1


def test_a_reward_beyond_0_and_1_needs_a_discriminators_name():
    line = {
        "id": "a",
        "sample": 0,
        "reward": 2.5,
        "status": "ok",
        "rollout": "f",
        "grader": "g",
    }
    assert (
        "expected a number in [0, 1] or null, got 2.5" in records.validate(line, "rewards")
        and records.validate(line | {"discriminator": "d"}, "rewards") is None
    )


def test_grading_is_refused_where_it_would_mean_nothing(world, pairs, tmp_path, capsys):
    def message(**flags):
        said = refusal(
            gad.main,
            argv(
                "grade",
                **dict(
                    dict(
                        discriminator=pairs.d,
                        rollouts=world.rollouts,
                        out=tmp_path / "w.jsonl",
                    ),
                    **flags,
                ),
            ),
            capsys,
        )
        assert not (tmp_path / "w.jsonl").exists()
        return said

    assert "expected a sequence classifier, got LlamaForCausalLM" in message(
        discriminator=world.base
    )
    foreign = dump(
        tmp_path / "r.jsonl",
        [dict(r, policy=r["policy"] | {"vocabulary": "0" * 12}) for r in load(world.rollouts)],
    )
    assert "policy.vocabulary" in message(rollouts=foreign)


# ---- where it must be blind


def test_a_length_view_sees_how_long_an_answer_is_and_nothing_else(
    world, pairs, tmp_path, capsys
):
    train.main(
        argv(
            method="discriminator",
            set="view=length",
            model=world.base,
            rollouts=world.rollouts,
            data=pairs.answers,
            out=tmp_path / "d",
            batch_size=4,
            learning_rate=1e-2,
        )
    )
    blind, seeing = load_scorer(str(tmp_path / "d")), load_scorer(str(pairs.d))
    assert blind.view == "length" and seeing.view == "text"
    prompt, answers = [2, 5, 3], [[7, 8, 9, END], [9, 7, 11, END], [7, 8, 9, 10], [7, 8, END]]
    scores = [
        scorer.scores([scorer.sees(prompt, a) for a in answers]) for scorer in (blind, seeing)
    ]
    assert scores[0][0] == scores[0][1] and len(set(scores[0])) == 3, (
        "the same length and the same ending: the same score"
    )
    assert len(set(scores[1])) == 4
    flags = dict(
        method="discriminator",
        model=tmp_path / "d",
        rollouts=world.rollouts,
        data=pairs.answers,
        out=tmp_path / "e",
    )
    assert "has learnt from the length of answers: expected text" in refusal(
        train.main, argv(**flags), capsys
    )


def held_out_accuracy(world, tmp_path, own, given):
    """Trained on the first half of the prompts, asked about the second."""
    ids = sorted({r["id"] for r in own})
    half = set(ids[: len(ids) // 2])
    parts = {
        name: dump(tmp_path / f"{name}.jsonl", [r for r in rows if (r["id"] in half) == first])
        for name, rows, first in (
            ("own", own, True),
            ("given", given, True),
            ("own2", own, False),
            ("given2", given, False),
        )
    }
    train.main(
        argv(
            method="discriminator",
            model=world.teacher,
            rollouts=parts["own"],
            data=parts["given"],
            out=tmp_path / "d",
            batch_size=8,
            epochs=12,
            learning_rate=1e-3,
            overwrite=True,
        )
    )
    return gad.main(
        argv(
            "grade",
            discriminator=tmp_path / "d",
            rollouts=parts["own2"],
            answers=parts["given2"],
            out=tmp_path / "w.jsonl",
            overwrite=True,
        )
    )["accuracy"]


def test_a_teachers_answers_beside_its_own_answers_are_a_coin(world, tmp_path):
    """Rollouts and answers of one model go through two stages and two roads into the
    discriminator: were one side's ending, template or padding another, it would tell them
    apart, as it does when one side's end token is taken away."""
    rollout.main(
        argv(
            model=world.teacher,
            prompts=world.prompts,
            n=16,
            max_tokens=40,
            seed=1,
            out=tmp_path / "r.jsonl",
        )
    )
    teacher.main(
        argv(
            "answer",
            model=world.teacher,
            prompts=world.prompts,
            n=16,
            max_tokens=40,
            seed=2,
            out=tmp_path / "a.jsonl",
        )
    )
    own, given = load(tmp_path / "r.jsonl"), load(tmp_path / "a.jsonl")
    questions = {p["id"]: p["messages"] for p in load(world.prompts)}
    bare = [
        {k: a[k] for k in ("id", "sample", "text", "finish_reason")}
        | {"policy": {"model": "somebody"}, "messages": questions[a["id"]]}
        for a in given
    ]
    # 12 prompts x 16 x 16 pairs; answers to one prompt hang together, so some six points of
    # scatter remain
    for answers in (given, bare):
        assert abs(held_out_accuracy(world, tmp_path, own, answers) - 0.5) < 0.12
    endless = [a | {"finish_reason": "length"} for a in bare]
    assert held_out_accuracy(world, tmp_path, own, endless) > 0.95


def test_pad_and_end_may_be_one_token(world, pairs, tmp_path):
    """A model whose padding is its end token: the score still stands at the end token that the
    answer has."""
    folder = variant(world.base, tmp_path / "m", lambda t: setattr(t, "pad_token", t.eos_token))
    scorer = load_scorer(str(folder), seed=0)
    scorer.model.config.pad_token_id = END
    sequences = [[2, 5, 3, 7, END], [2, 5, 3, 7], [2, 5, 3, 7, 8, 9, END]]
    together = scorer.scores(sequences)
    alone = list(itertools.chain.from_iterable(scorer.scores([s]) for s in sequences))
    assert together == pytest.approx(alone, abs=1e-5) and abs(together[0] - together[1]) > 1e-4


def test_a_killed_run_goes_on(world, pairs, tmp_path, monkeypatch):
    """Four steps = two, a kill, and two more from the checkpoint: the same bits."""
    flags = dict(
        method="discriminator",
        model=world.base,
        rollouts=world.rollouts,
        data=pairs.answers,
        batch_size=4,
        epochs=2,
        learning_rate=1e-2,
        save_every=2,
    )
    train.main(argv(out=tmp_path / "whole", **flags))
    calls, step = [], train.optimise

    def dying(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(train, "optimise", dying)
    with pytest.raises(KeyboardInterrupt):
        train.main(argv(out=tmp_path / "cut", **flags))
    monkeypatch.setattr(train, "optimise", step)
    train.main(argv(out=tmp_path / "cut", **flags))
    a, b = (naive_discriminator(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a) and gad.hash_weights(
        tmp_path / "whole"
    ) == gad.hash_weights(tmp_path / "cut")
