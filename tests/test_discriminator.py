"""The discriminator: its loss by autograd, its gradient and its scores by plain transformers in
float64, its blindness where it must be blind."""

import itertools
import math
import types

import numpy as np
import pytest
import torch
from conftest import argv, dump, load, refusal, same_bits, variant, with_positions
from safetensors.torch import load_file
from test_train import PLAIN, Recorder
from transformers import AutoModelForSequenceClassification

import rollout
import teacher
from methods import gad
from methods.gad import load_scorer, pair_weights, verdicts
from opd import files, records
from opd import policy as policies
from opd.batches import Data, Inputs
from opd.trainer import Trainer

END = 4


# ---- the loss


@pytest.mark.parametrize("kind", gad.LOSSES)
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
    values = [pair_loss(kind, t[i % len(given)], s[i]) for i in range(len(own))]
    sum(values).backward()
    up, down, losses = pair_weights(kind, given, own)
    assert losses == pytest.approx([v.item() for v in values], abs=1e-12)
    assert [*up, *down] == pytest.approx((-torch.cat([t.grad, s.grad])).tolist(), abs=1e-12)


def pair_loss(kind, t, s):
    softplus = torch.nn.functional.softplus
    if kind == "bradley-terry":
        return softplus(s - t)
    return softplus(-t) + softplus(s)


def test_verdicts_by_hand():
    """Two questions: margins 1, 0 (a tie), -1; 2.  Lengths centred: -1, 0, 1 and 0; scores
    centred: -1, 0, 1 and 0: correlation 1."""
    got = verdicts([([1.0], [0.0, 1.0, 2.0], [5, 6, 7]), ([3.0], [1.0], [50])])
    want = {"accuracy": 2.5 / 4, "margin": 2 / 4, "length_correlation": 1.0}
    assert got == pytest.approx(want | {"score_std": math.sqrt(2 / 3) / 2})
    alone = verdicts([([], [0.0, 1.0], [5, 3])])
    assert "accuracy" not in alone and alone["length_correlation"] == pytest.approx(-1)


# ---- one step


def learn(world, answers, out, **flags):
    """methods.gad train, from the world's base model by default."""
    usual = dict(model=world.base, rollouts=world.rollouts, batch_size=4, learning_rate=1e-2)
    return argv("train", data=answers, out=out, **usual | flags)


@pytest.fixture(scope="module")
def pairs(world, tmp_path_factory):
    """Answers of the teacher to the prompts of the world's rollouts, two each, one of them cut;
    and a discriminator after two steps."""
    root = tmp_path_factory.mktemp("pairs")
    answers = root / "a.jsonl"
    flags = dict(slice=":8", n=2, max_tokens=28, seed=1, out=answers)
    teacher.main(argv("answer", model=world.teacher, prompts=world.prompts, **flags))
    gad.main(learn(world, answers, root / "d"))
    return types.SimpleNamespace(answers=answers, d=root / "d")


def naive_score(model, ids):
    """D of one unpadded sequence, from plain transformers."""
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
    return hidden[0, -1] @ model.score.weight[0]


def naive_scores(model, path):
    """{prompt: [D of its answers]}, by plain transformers."""
    out = {}
    for r in load(path):
        score = naive_score(model, r["prompt_ids"] + r["response_ids"])
        out.setdefault(r["id"], []).append(score)
    return out


def naive_discriminator(folder):
    kind = AutoModelForSequenceClassification
    return kind.from_pretrained(folder, dtype=torch.float64).eval()


def one_step(rollouts, answers, model, micro=8192, kind="bradley-terry"):
    """(flat gradient, metrics) of one step on all pairs, as methods.gad train takes it."""
    scorer = load_scorer(str(model), view="text", seed=0)
    own, given = (Data(Inputs(path), gad.TEXTS, scorer) for path in (rollouts, answers))
    trainer = Trainer(scorer, PLAIN)
    trainer.optimiser = Recorder(trainer.masters)
    items = own.items(own.groups), given.items(own.groups)
    numbers = gad.optimise(trainer, *items, kind, micro)
    return trainer.optimiser.gradient, numbers


@pytest.mark.parametrize("kind", gad.LOSSES)
def test_the_gradient_of_a_step_is_that_of_the_mean_over_pairs(world, pairs, kind):
    """Every own answer with a given one in turn; one sequence at a time, float64, no padding,
    through plain transformers.  Micro-batches and padding change nothing."""
    model, values = naive_discriminator(pairs.d), []
    given = naive_scores(model, pairs.answers)
    for prompt, scores in naive_scores(model, world.rollouts).items():
        t = given[prompt]
        values += [pair_loss(kind, t[i % len(t)], s) for i, s in enumerate(scores)]
    loss = sum(values) / len(values)
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    got, numbers = one_step(world.rollouts, pairs.answers, pairs.d, kind=kind)
    assert float((got - want).norm() / want.norm()) < 2e-5
    assert numbers["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
    part, other = one_step(world.rollouts, pairs.answers, pairs.d, 90, kind)
    assert float((part - got).norm() / got.norm()) < 1e-5
    assert other == pytest.approx(numbers, rel=1e-4, abs=1e-6)


def as_text(world, answers):
    """Answers as a black box returns them: no tokens."""
    questions = {p["id"]: p["messages"] for p in load(world.prompts)}
    rows = []
    for a in answers:
        row = {k: a[k] for k in ("id", "sample", "text", "finish_reason")}
        row |= {"policy": {"model": "somebody"}, "messages": questions[a["id"]]}
        rows.append(row)
    return rows


def test_a_text_only_answer_is_the_same_answer(world, pairs, tmp_path):
    """A black box returns no tokens: its text, with an end token iff it ended by itself, gives
    the very gradient of the ids."""
    tokenizer = policies.load_tokenizer(str(world.base))
    spelt = []  # no <|user|> in its midst
    for a in load(pairs.answers):
        ids = tokenizer(a["text"])["input_ids"] + [END] * (a["finish_reason"] == "stop")
        if ids == a["response_ids"]:
            spelt.append(a)
    assert {"stop", "length"} == {a["finish_reason"] for a in spelt} and len(spelt) > 4
    asked = {a["id"] for a in spelt}
    own = dump(tmp_path / "own.jsonl", [r for r in load(world.rollouts) if r["id"] in asked])
    bare = dump(tmp_path / "bare.jsonl", as_text(world, spelt))
    got, _ = one_step(own, bare, pairs.d)
    want, _ = one_step(own, dump(tmp_path / "ids.jsonl", spelt), pairs.d)
    assert torch.equal(got, want)


# ---- folders


def test_a_first_discriminator_is_the_policy_with_a_seeded_head(world):
    a, b, c = (load_scorer(str(world.base), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.head, b.head) and not torch.equal(a.head, c.head)
    own = policies.load_policy(str(world.base)).model.model.state_dict()
    assert same_bits(own, a.model.model.state_dict())


def test_the_folder_is_a_transformers_classifier_and_goes_on(world, pairs, tmp_path):
    """Optimiser and step count go on, and the loss on the same pairs falls."""
    model = naive_discriminator(pairs.d)
    r = next(r for r in load(world.rollouts) if r["response_ids"][-1] == END)
    ids = r["prompt_ids"] + r["response_ids"]
    with torch.no_grad():  # no padding in sight, so transformers reads the score where we do
        logit = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        assert logit == pytest.approx(float(naive_score(model, ids)), abs=1e-9)
    done = gad.main(learn(world, pairs.answers, tmp_path / "d2", model=pairs.d, epochs=2))
    assert done["steps"] == 4 and done["step"] == 6
    before, after = (
        one_step(world.rollouts, pairs.answers, folder)[1]["train/loss"]
        for folder in (pairs.d, tmp_path / "d2")
    )
    assert after < before - 1e-3


def test_lora_trains_the_score_head_whole_and_freezes_the_embedding(world, pairs, tmp_path):
    lora = dict(optimizer=dict(lora_rank=2), seed=0, epochs=3)
    gad.main(learn(world, pairs.answers, tmp_path / "d", **lora))
    base, found = (load_file(f / "model.safetensors") for f in (world.base, tmp_path / "d"))
    embedding = "model.embed_tokens.weight"
    assert torch.equal(found[embedding], base[embedding])
    drawn = load_scorer(str(world.base), view="text", seed=0).model.score.weight.detach()
    assert float((found["score.weight"] - drawn).abs().max()) > 1e-3
    losses = [row["train/loss"] for row in files.read(tmp_path / "d/metrics.jsonl", "metrics")]
    assert losses[-1] < losses[0] - 1e-2


# ---- grading


def grade_flags(world, pairs, out, **flags):
    usual = dict(discriminator=pairs.d, rollouts=world.rollouts, out=out)
    return argv("grade", **usual | flags)


def test_a_discriminator_without_positions_for_an_answer_is_refused(
    world, pairs, tmp_path, capsys
):
    short = with_positions(pairs.d, tmp_path / "d", 8)
    flags = grade_flags(world, pairs, tmp_path / "w.jsonl", discriminator=short)
    assert "expected at most 8 tokens" in refusal(gad.main, flags, capsys)


def test_rewards_are_the_scores_and_name_the_discriminator(world, pairs, tmp_path):
    path = tmp_path / "w.jsonl"
    done = gad.main(grade_flags(world, pairs, path, answers=pairs.answers))
    model, rewards = naive_discriminator(pairs.d), load(path)
    with torch.no_grad():
        own = naive_scores(model, world.rollouts)
        given = naive_scores(model, pairs.answers)
    by_prompt = {}
    for r in rewards:
        by_prompt.setdefault(r["id"], []).append(r["reward"])
    for prompt, scores in own.items():
        assert by_prompt[prompt] == pytest.approx([float(s) for s in scores], abs=1e-4)
    assert {r["discriminator"] for r in rewards} == {policies.hash_weights(pairs.d)}
    gaps = [float(t - s) for prompt in own for s in own[prompt] for t in given[prompt]]
    assert done["accuracy"] == pytest.approx(np.mean([x > 0 for x in gaps]), abs=0.02)
    assert done["margin"] == pytest.approx(np.mean(gaps), abs=1e-4)


def test_what_would_mean_nothing_is_refused(world, pairs, tmp_path, capsys):
    rows = load(world.rollouts)
    foreign = [dict(r, policy=r["policy"] | {"vocabulary": "0" * 12}) for r in rows]
    foreign = dump(tmp_path / "foreign.jsonl", foreign)
    out = tmp_path / "out"
    gad.main(learn(world, pairs.answers, tmp_path / "d", view="length"))
    for command, words in (
        (
            learn(world, pairs.answers, out, model=tmp_path / "d"),
            "has learnt from the length of answers: expected text",
        ),
        (
            grade_flags(world, pairs, out, discriminator=world.base),
            "expected a sequence classifier, got LlamaForCausalLM",
        ),
        (grade_flags(world, pairs, out, rollouts=foreign), "policy.vocabulary"),
    ):
        assert words in refusal(gad.main, command, capsys)


# ---- where it must be blind


def test_a_length_view_sees_how_long_an_answer_is_and_nothing_else(world, pairs):
    prompt, answers = [2, 5, 3], [[7, 8, 9, END], [9, 7, 11, END], [7, 8, 9, 10], [7, 8, END]]
    seeing = load_scorer(str(pairs.d))
    blind = load_scorer(str(world.base), seed=0, view="length")
    few, many = (s.scores([s.sees(prompt, a) for a in answers]) for s in (blind, seeing))
    assert few[0] == few[1] and len(set(few)) == 3, "length and ending are all it sees"
    assert len(set(many)) == 4


def held_out_accuracy(world, folder, own, given):
    """Trained on the first half of the prompts, asked about the second."""
    folder.mkdir()
    ids = sorted({r["id"] for r in own})
    half, parts = set(ids[: len(ids) // 2]), {}
    for name, rows in (("own", own), ("given", given)):
        for first in (True, False):
            some = [r for r in rows if (r["id"] in half) == first]
            parts[name, first] = dump(folder / f"{name}-{first}.jsonl", some)
    flags = dict(model=world.teacher, rollouts=parts["own", True], batch_size=4, epochs=5)
    gad.main(learn(world, parts["given", True], folder / "d", learning_rate=1e-3, **flags))
    asked = dict(rollouts=parts["own", False], answers=parts["given", False])
    out = types.SimpleNamespace(d=folder / "d")
    return gad.main(grade_flags(world, out, folder / "w.jsonl", **asked))["accuracy"]


def test_a_teachers_answers_beside_its_own_answers_are_a_coin(world, tmp_path):
    """Rollouts and answers of one model go through two stages and two roads into the
    discriminator: were one side's ending, template or padding another, it would tell them
    apart, as it does when one side's end token is taken away."""
    flags = dict(model=world.teacher, prompts=world.prompts, n=8, max_tokens=40)
    rollout.main(argv(**flags, seed=1, out=tmp_path / "r.jsonl"))
    teacher.main(argv("answer", **flags, seed=2, out=tmp_path / "a.jsonl"))
    own, given = load(tmp_path / "r.jsonl"), as_text(world, load(tmp_path / "a.jsonl"))
    # 12 prompts x 8 x 8 pairs; answers to one prompt hang together
    assert abs(held_out_accuracy(world, tmp_path / "coin", own, given) - 0.5) < 0.12
    endless = [a | {"finish_reason": "length"} for a in given]
    assert held_out_accuracy(world, tmp_path / "endless", own, endless) > 0.95


def test_pad_and_end_may_be_one_token(world, tmp_path):
    """A model whose padding is its end token: the score still stands at the end token that the
    answer has."""
    folder = variant(world.base, tmp_path / "m", lambda t: setattr(t, "pad_token", t.eos_token))
    scorer = load_scorer(str(folder), seed=0)
    scorer.model.config.pad_token_id = END
    sequences = [[2, 5, 3, 7, END], [2, 5, 3, 7], [2, 5, 3, 7, 8, 9, END]]
    together = scorer.scores(sequences)
    alone = list(itertools.chain.from_iterable(scorer.scores([s]) for s in sequences))
    assert together == pytest.approx(alone, abs=1e-5) and abs(together[0] - together[1]) > 1e-4


def test_a_reward_beyond_0_and_1_needs_a_discriminators_name():
    line = dict(id="a", sample=0, reward=2.5, status="ok", rollout="f", grader="g")
    problem = records.validate(line, "rewards")
    assert "expected a number in [0, 1] or null, got 2.5" in problem
    assert records.validate(line | {"discriminator": "d"}, "rewards") is None
