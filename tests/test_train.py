"""train.py: the gradient is the formula's, whatever the batching, the kernel or where the
teacher is read; a killed run ends in the same bits.  (What may become a step at all:
test_data.py.)  The reference is plain transformers in float64, a sequence at a time."""

import copy
import json
import shutil
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    argv,
    by_key,
    dump,
    edge_rollouts,
    load,
    make_rewards,
    naive_logps,
    naive_model,
    naive_own,
    padded,
    permuted,
    refusal,
    same_bits,
    variant,
    weights,
)
from safetensors.torch import load_file

import rollout
import teacher
import train
from methods.rows import METHODS
from opd import batches, disk, kernel, pairs, records
from opd import loss as losses
from opd import policy as policies
from opd import trainer as trainers
from opd.batches import Data, Inputs
from opd.chat import render
from opd.files import read
from opd.shared import share_prompts

V, END = 24, 4
FAST = dict(learning_rate=1e-3, batch_size=3)
PLAIN = trainers.TrainerSettings(1e-3, 0.01, 0.999, 0.0, "constant", 0, None, 100)


def row_of(method, overrides=()):
    """The row, and a lower bar where the rewards of the world, drawn from [0, 1], would never
    reach it."""
    bar = ("omega_scale=0.5",) if METHODS[method].omega == "accepted" else ()
    return losses.method_named(METHODS, method, overrides or bar)


def changed(world, **paths):
    return types.SimpleNamespace(**vars(world) | paths)


def needs(world, method, overrides=()):
    """The files a row of METHODS reads, as flags."""
    row = row_of(method, overrides)
    flags = dict(method=method, rollouts=world.rollouts)
    if row.rewards:
        flags["rewards"] = world.rewards
    if row.teacher:
        flags["scores"] = with_sorted(world.scores) if row.own else world.scores
    if row.reference:  # any policy can be the reference; the teacher is a far one
        flags["reference"] = world.scores
    if row.prefix == "mixed":
        flags |= dict(data=world.rollouts, data_scores=world.scores)
    if row.gold_weight:
        flags["data"] = world.prompts  # their solutions
    if row.token_weight != "one":
        flags["token_weights"] = token_weights(world.rollouts)
    if row.consistency == "sft":  # the world's base model was fine-tuned on nobody's answers
        flags["allow"] = "teacher"
    # the same texts, said to be the teacher's, or those of weights that are gone
    if row.prefix == "teacher":
        author = load(world.scores)[0]["policy"]["weights"]
        flags["rollouts"] = written_by(author, world.rollouts)
    if row.prefix == "old":
        flags["rollouts"] = written_by("0" * 12, world.rollouts)
    return flags


def written_by(author, rollouts):
    """The rollouts, said to be of other weights."""
    rows = [dict(r, policy=r["policy"] | {"weights": author}) for r in load(rollouts)]
    return dump(rollouts.with_suffix(f".{author}.jsonl"), rows)


def with_sorted(scores):
    """The same scores with the log-probs of every place in order, as methods.simct --sorted."""
    rows = load(scores)
    for s in rows:
        logps = records.unpack(s["topk"]["logprobs"])
        s["sorted"] = records.pack(np.sort(logps)[:, ::-1].copy())
    return dump(scores.with_suffix(".sorted.jsonl"), rows)


def token_weights(rollouts):
    """A file beside the rollouts with 0, 1 or 2.5 for every response token."""
    rows = []
    for i, r in enumerate(load(rollouts)):
        numbers = [(0, 1, 2.5)[(t + i) % 3] for t in range(len(r["response_ids"]))]
        key = {name: r[name] for name in ("id", "sample")}
        made = {"rollout": records.fingerprint(r), "rule": "test", "weights": numbers}
        rows.append(key | made)
    return dump(rollouts.with_suffix(".weights.jsonl"), rows)


def words(world, out, **flags):
    """train.py's command line on the world's base model, by default."""
    flags = needs(world, flags.get("method", "opd")) | flags
    return argv(**dict(model=world.base, out=out, **FAST) | flags)


def run(world, out, **flags):
    return train.main(words(world, out, **flags))


def refused(world, tmp_path, capsys, **flags):
    message = refusal(train.main, words(world, tmp_path / "refused", **flags), capsys)
    assert not (tmp_path / "refused").exists(), (
        "a refusal leaves nothing that looks like a model"
    )
    return message


def moved(a, b):
    """Largest difference between two models' parameters."""
    a, b = weights(a), weights(b)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def metrics(folder):
    return list(read(folder / "metrics.jsonl", "metrics"))


# ---- one step's gradient


class Recorder:
    """An optimiser that only writes the gradient down."""

    def __init__(self, masters):
        self.masters = masters

    def step(self):
        self.gradient = flat_gradient(self.masters).double()

    def zero_grad(self):
        for m in self.masters:
            m.grad = None


def flat_gradient(parameters):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.flatten() for g in grads])


def gradient(
    world,
    flags,
    micro=8192,
    model=None,
    overrides=(),
    old=None,
    dtype="auto",
    kernel="auto",
    teacher=None,
    share=False,
):
    """train.py's gradient for one step on all rollouts: (one flat float64 vector, the step's
    metrics)."""
    method = row_of(flags["method"], overrides)
    names = ("rollouts", "rewards", "scores", "reference", "token_weights")
    own = Inputs(*[flags.get(name) for name in names])
    policy = policies.load_policy(str(model or world.base), dtype)
    helper = teacher and policies.load_policy(str(teacher))
    for each in filter(None, (policy, helper)) if share else ():
        share_prompts(each, micro)
    data = Data(own, method, policy, helper, allow_stale=model is not None)
    items = data.items(data.groups)
    for item in items if old else ():
        item["old_logp"] = np.asarray(old[item["key"]], np.float32)
    step = train.StepSettings(micro, kernel, flags.get("teacher_top_k"))
    trainer = trainers.Trainer(policy, PLAIN)
    trainer.optimiser = Recorder(trainer.masters)
    given, golden = None, ()
    if method.gold_weight:
        given = Data(Inputs(flags["data"]), METHODS["sft"], policy)
        golden = given.items(data.groups)
    numbers = train.optimise(trainer, data, items, step, given, golden)
    return trainer.optimiser.gradient, numbers


# ---- the same from opd/loss.py's token losses and weights, which test_loss.py proves


def told_by(score):
    """What a score says of every response token; the reference is the teacher, too."""
    ids, logps = (torch.tensor(records.unpack(score["topk"][f])) for f in ("ids", "logprobs"))
    table = torch.zeros(len(ids), V).scatter_(1, ids.long(), logps.float())
    names = ("teacher_logp", "reference_logp")
    out = dict.fromkeys(names, torch.tensor(score["logprobs"]))
    return out | dict.fromkeys(("support_logp", "reference_support_logp"), table)


class Step:
    """By key: the model's log-probs [T, V] where a token is trained, and what the files say."""

    def __init__(self, model, flags, old=None, temperature=1.0):
        beside = flags | dict(scores=flags.get("scores") or flags.get("reference"))
        names = ("rewards", "token_weights", "scores")
        tables = [by_key(load(beside[n])) if beside.get(n) else {} for n in names]
        self.rewards, weighed, scores = tables
        self.groups, self.logps, self.known = {}, {}, {}
        for key, r in by_key(load(flags["rollouts"])).items():
            self.groups.setdefault(key[0], []).append(key)
            trained = torch.tensor(r["loss_mask"], dtype=torch.bool)
            table = naive_logps(model, r["prompt_ids"], r["response_ids"], temperature)
            known = told_by(scores[key]) if key in scores else {}
            known["behaviour_logp"] = torch.tensor(r["logprobs"])
            known["ids"] = torch.tensor(r["response_ids"], dtype=torch.int64)
            if key in weighed:
                known["token_weight"] = torch.tensor(weighed[key]["weights"])
            self.logps[key] = table[trained]
            self.known[key] = {name: x[trained] for name, x in known.items()}
            if old:
                self.known[key]["old_logp"] = torch.tensor(old[key])

    def own(self, key):
        """log pi of the trained tokens, [T]."""
        return self.logps[key].gather(1, self.known[key]["ids"][:, None])[:, 0]

    def omegas(self, row, keys, rewards):
        """Of a group's answers."""
        omegas = losses.sequence_weights(row, rewards)
        if row.omega != "preference":
            return omegas
        pair = [(key, sign) for key, sign in zip(keys, omegas) if sign]
        if any(not len(self.own(key)) for key, _ in pair):  # half a pair is no preference
            return [0.0] * len(keys)
        gaps = [(self.own(k) - self.known[k]["reference_logp"]).sum().item() for k, _ in pair]
        weights = pairs.preference_weights(row.omega_scale, [s for _, s in pair], gaps)
        found = dict(zip([key for key, _ in pair], weights))
        return [found.get(key, 0.0) for key in keys]

    def losses(self, row, key):
        """[T], the whole vocabulary as support."""
        logp, known = self.logps[key], self.known[key]
        if row.coefficient == "own":
            tables = logp.exp(), known["support_logp"].exp()
            largest, theirs = (p.sort(descending=True).values for p in tables)
            return (largest - theirs).abs().sum(-1)
        numbers = torch.cat([self.own(key)[:, None], logp], 1)
        whole = {"whole": True, "reference_whole": True}
        return losses.token_loss(row, numbers, known | whole)


def golden_answers(model, prompts, rollouts):
    """(prompt ids, ids of its solution) of the prompts that were rolled out."""
    tokenizer = policies.load_tokenizer(model.name_or_path)
    asked = {r["id"] for r in load(rollouts)}
    for p in load(prompts):
        if p["id"] in asked:
            ids = tokenizer(p["solution"])["input_ids"]
            yield render(tokenizer, p), ids + [END]


def naive_gradient(model, row, flags, old=None, temperature=1.0):
    """The same step: full logits, float64, one unpadded sequence at a time."""
    model = copy.deepcopy(model)
    step = Step(model, flags, old, temperature)
    omegas = dict.fromkeys(step.known, 1.0)
    for keys in step.groups.values() if row.rewards else ():
        rewards = [step.rewards[k]["reward"] for k in keys]
        omegas.update(zip(keys, step.omegas(row, keys, rewards)))
        for key, advantage in zip(keys, losses.group_advantages(rewards, row.advantage)):
            step.known[key]["advantage"] = torch.tensor(advantage)
    kept = [key for key in step.known if len(step.own(key)) and omegas[key]]
    tokens, total = sum(len(step.own(key)) for key in kept), 0.0
    for key in kept:
        own = len(kept) * len(step.own(key))
        norm = {"token": tokens, "sequence": own, "batch": len(kept)}[row.norm]
        total = total + omegas[key] * step.losses(row, key).sum() / norm
    if row.gold_weight:
        gold = golden_answers(model, flags["data"], flags["rollouts"])
        own = [naive_logps(model, p, ids)[range(len(ids)), ids] for p, ids in gold]
        total = total - row.gold_weight * torch.cat(own).mean()
    total.backward()
    return flat_gradient(model.parameters())


def same_gradient(got, want, tolerance):
    """|got - want| <= tolerance |want|."""
    assert float(want.norm()) > 1e-3, "the reference gradient should not be empty"
    assert float((got - want).norm() / want.norm()) < tolerance


@pytest.fixture(scope="module")
def masked(world, tmp_path_factory):
    """Five groups of the world with holes in the loss masks: some tokens, the beginning of one
    answer, all of two answers."""
    rng = np.random.default_rng(0)
    rows = load(world.rollouts)[:20]
    for i, r in enumerate(rows):
        if i % 3 == 0:
            r["loss_mask"] = [int(rng.random() < 0.7) for _ in r["loss_mask"]]
        if i in (5, 11):
            r["loss_mask"] = [0] * len(r["loss_mask"])
    assert len({len(r["prompt_ids"]) for r in rows}) > 2
    assert len({sum(r["loss_mask"]) for r in rows}) > 8
    path = dump(tmp_path_factory.mktemp("masked") / "rollouts.jsonl", rows)
    return changed(world, rollouts=path)


STALE = ("opd", "dapo", "ropd", "ropd-paper", "opd-grpo", "stable-opd", "sod", "lightning")
# units of several tokens: test_units.py
ROWS = [(m, ()) for m in METHODS if m not in ("simct", "simple-opd")] + [
    ("opd", ("norm=sequence", "clip_low=0.2", "clip_high=0.2")),
    ("opd", ("coefficient=k2", "norm=batch")),
    ("opd", ("baseline=kl", "advantage_clip=0.3")),
    ("gkd", ("interpolation=0.9",)),
    ("opd-grpo", ("teacher_weight=0.3", "baseline=kl")),
    ("dpo", ("prefix=self", "omega_scale=0.7")),
    ("lightning", ("ratio=token", "tis_cap=1.1", "advantage_clip=0.3", "norm=token")),
    ("stable-opd", ("reference_support=full", "gold_weight=0", "reference_kl=0.5")),
    ("opd-full", ("token_weight=file",)),
    ("opd-full", ("prefix=data",)),
]
FORMS = ["sft", "opd-full", "sod", "ropd-paper", "dpo", "gkd", "uld", "stable-opd"]


@pytest.fixture
def in_slices(monkeypatch):
    """The three-product form of the kernel, in slices of 5 tokens."""
    monkeypatch.setattr(kernel, "slice_rows", lambda tokens, vocabulary: 5)


@pytest.mark.parametrize("method, overrides", ROWS)
def test_the_first_step_has_the_gradient_of_the_formula(
    masked, base64bit, in_slices, method, overrides
):
    """Every row of METHODS, in micro-batches of a few answers: relative error of the whole
    gradient below 2e-5 (float32 against float64)."""
    flags, row = needs(masked, method, overrides), row_of(method, overrides)
    got, _ = gradient(masked, flags, overrides=overrides, micro=90)
    same_gradient(got, naive_gradient(base64bit, row, flags), 2e-5)


@pytest.mark.parametrize("method", STALE)
def test_later_steps_weigh_by_the_importance_ratio(masked, drifted, method):
    """After an update: ratios, clips and truncated importance weights against log-probs
    recorded before it."""
    rng, old = np.random.default_rng(1), {}
    for r in load(masked.rollouts):
        noisy = np.array(r["logprobs"]) + rng.normal(0, 0.5, len(r["logprobs"]))
        old[r["id"], r["sample"]] = [min(x, 0.0) for x, m in zip(noisy, r["loss_mask"]) if m]
    flags = needs(masked, method)
    got, numbers = gradient(masked, flags, model=drifted, old=old)
    want = naive_gradient(naive_model(drifted), row_of(method), flags, old)
    same_gradient(got, want, 1e-4)
    if METHODS[method].clip_low:
        assert numbers["policy/clip_fraction"] > 0.05, "the fixture should clip"


def test_importance_weights_and_token_weights_are_logged(world, drifted):
    rollouts, model = load(world.rollouts), naive_model(drifted)
    _, numbers = gradient(world, needs(world, "opd"), model=drifted)
    gaps = [np.subtract(naive_own(model, r), r["logprobs"]) for r in rollouts]
    weight = np.exp(np.concatenate(gaps))
    assert numbers["policy/weight_std"] == pytest.approx(weight.std(), rel=1e-3)
    ess = weight.mean() ** 2 / (weight**2).mean()
    assert numbers["policy/weight_ess"] == pytest.approx(ess, rel=1e-3)
    flags = needs(world, "release")
    _, numbers = gradient(world, flags)
    kept = np.concatenate([r["weights"] for r in load(flags["token_weights"])]) > 0
    assert numbers["weights/kept"] == pytest.approx(kept.mean(), abs=1e-5)


def test_rollouts_at_another_temperature_train_that_distribution(world, base64bit, tmp_path):
    path = tmp_path / "r.jsonl"
    flags = dict(slice=":3", n=3, max_tokens=20, temperature=0.7)
    rollout.main(argv(model=world.base, prompts=world.prompts, out=path, **flags))
    flags = dict(method="grpo", rollouts=path, rewards=make_rewards(path, tmp_path / "w.jsonl"))
    got, numbers = gradient(world, flags)
    want = naive_gradient(base64bit, METHODS["grpo"], flags, temperature=0.7)
    same_gradient(got, want, 2e-5)
    assert numbers["rollout/logprob_gap_max"] < 2e-5
    lie = dump(tmp_path / "lie.jsonl", [dict(r, temperature=1.0) for r in load(path)])
    _, numbers = gradient(world, flags | dict(rollouts=lie))
    assert numbers["rollout/logprob_gap_mean"] > 0.05, "a lie shows in the gap"


# ---- kernels, a teacher in memory


@pytest.mark.parametrize("method", FORMS)
def test_slices_recomputing_naive_logits_and_micro_batches_give_one_gradient_and_metrics(
    masked, monkeypatch, in_slices, method
):
    """Means of the means of micro-batches would be off by far."""
    flags, separable = needs(masked, method), METHODS[method].separable
    whole, numbers = gradient(masked, flags)
    for in_one_pass, how in (
        (False, {}),
        (separable, dict(kernel="naive")),
        (separable, dict(micro=1)),
        (False, dict(share=True)),
        (separable, dict(share=True, micro=1)),
    ):
        monkeypatch.setattr(losses.Method, "separable", in_one_pass)
        got, others = gradient(masked, flags, **how)
        same_gradient(got, whole, 1e-5)
        assert others == pytest.approx(numbers, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def wide_teacher(world, tmp_path_factory):
    """A teacher with 8 more rows in its head, which are no tokens."""
    return variant(world.teacher, tmp_path_factory.mktemp("wide") / "m", model=padded(8))


@pytest.mark.parametrize(
    "method, overrides, k",
    [("gkd", (), V), ("opd", ("baseline=kl",), 5), ("opd", (), None), ("opd-full", (), None)],
)
def test_a_teacher_in_memory_gives_the_gradient_of_its_scores_on_disk(
    masked, wide_teacher, tmp_path, method, overrides, k
):
    """Its k likeliest tokens, or (None) its whole vocabulary."""
    scores = tmp_path / "scores.jsonl"
    flags = dict(model=wide_teacher, rollouts=masked.rollouts, out=scores, top_k=k or V)
    teacher.main(argv("score", **flags))
    flags = needs(changed(masked, scores=scores), method, overrides)
    disk, disk_numbers = gradient(masked, flags, overrides=overrides)
    flags |= dict(scores=None, teacher_top_k=k)
    for share in (False, True):
        how = dict(teacher=wide_teacher, overrides=overrides, share=share)
        memory, numbers = gradient(masked, flags, **how)
        same_gradient(memory, disk, 1e-5)
        for name in ("train/loss", "kl/teacher", "policy/entropy"):
            assert numbers[name] == pytest.approx(disk_numbers[name], rel=1e-4)


def test_a_teacher_that_cannot_be_read_is_refused(world, tmp_path, capsys, monkeypatch):
    change = lambda t: setattr(t, "chat_template", t.chat_template + " ")
    foreign = variant(world.teacher, tmp_path / "permuted", permuted)
    other = variant(world.teacher, tmp_path / "template", change)
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    flags = dict(method="opd-full", scores=None)
    for more, complaint in (
        (dict(teacher=foreign), "token ids mean different things"),
        (dict(teacher=other), "--allow template"),
        (dict(teacher=world.teacher, compute="kernel=triton"), "--teacher"),
        (dict(compute="kernel=triton", scores=world.scores), "pip install triton"),
        (dict(teacher=world.teacher, scores=world.scores), "give one of them"),
        (dict(method="gkd", data_scores=None, teacher=world.teacher), "--teacher-top-k"),
        (dict(scores=world.scores, teacher_top_k=4), "--teacher-top-k"),
    ):
        assert complaint in refused(world, tmp_path, capsys, **flags | more)
    assert run(world, tmp_path / "m", **flags, teacher=other, allow="template")["steps"] > 0


# ---- masks, lengths


@pytest.mark.parametrize("method", ["sft", "dpo", "ropd", "release", "opd-full", "stable-opd"])
def test_log_probs_under_a_masked_token_are_never_read(masked, tmp_path, method):
    clean, rows = needs(masked, method), load(masked.rollouts)
    scores = by_key(load(masked.scores))
    for r in rows:
        s = scores[r["id"], r["sample"]]
        top = records.unpack(s["topk"]["logprobs"])
        for t, kept in enumerate(r["loss_mask"]):
            if not kept:
                r["logprobs"][t] = s["logprobs"][t] = records.LOWEST
                top[t] = records.LOWEST
        s["topk"]["logprobs"] = records.pack(top)
    rollouts = dump(tmp_path / "r.jsonl", rows)
    scores = dump(tmp_path / "s.jsonl", scores.values())
    wild = needs(changed(masked, rollouts=rollouts, scores=scores), method)
    got, _ = gradient(masked, wild)
    assert torch.isfinite(got).all()
    same_gradient(got, gradient(masked, clean)[0], 1e-6)


def test_one_token_and_empty_answers_train(world, base64bit, tmp_path):
    path, scores = edge_rollouts(world, tmp_path / "r.jsonl", base64bit), tmp_path / "s.jsonl"
    teacher.main(argv("score", model=world.teacher, rollouts=path, out=scores, top_k=V))
    rewards = make_rewards(path, tmp_path / "w.jsonl")
    world = changed(world, rollouts=path, scores=scores, rewards=rewards)
    for method in ("sft", "rwsft", "opd", "opd-full", "ropd-paper", "uld"):
        flags = needs(world, method)
        got, numbers = gradient(world, flags)
        tokens = 1 + len(load(path)[2]["response_ids"])
        assert (numbers["train/sequences"], numbers["train/tokens"]) == (2, tokens)
        same_gradient(got, naive_gradient(base64bit, METHODS[method], flags), 2e-5)
    # and the whole stage, with log-probs of the starting weights
    run(world, tmp_path / "m", epochs=2)
    assert len(metrics(tmp_path / "m")) == 2


def test_a_bfloat16_model_accumulates_micro_batches_in_float32():
    """1 and 256 times 1/512: in bfloat16, with 8 bits, the sum would stay 1."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    trainer = trainers.Trainer(types.SimpleNamespace(model=model), PLAIN)
    for part in [1.0] + [1 / 512] * 256:
        (part * model.weight).sum().backward()
    assert trainer.masters[0].grad.item() == 1.5


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype, shared", [("float32", 0), ("float32", 1), ("bfloat16", 0)])
def test_gradient_checkpointing_computes_more_and_changes_no_bit(
    world, tmp_path, monkeypatch, kind, dtype, shared
):
    """Micro-batches, a tied head, and dropout, which must stay off."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, attention_dropout=0.5)
    config = transformers.AutoConfig.for_model(kind, **sizes, tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    folder = variant(world.base, tmp_path / kind, model=lambda _: model)
    attention = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def counted(*args, **options):
        calls.append(1)
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    flags = dict(method="sft", model=folder, steps=3, dtype=dtype, micro_batch_tokens=100)
    flags |= dict(rollouts=world.rollouts, prompts=world.prompts)
    flags |= dict(compute=dict(shared_prompts=shared))
    run(world, tmp_path / "plain", **flags)
    plain = len(calls)
    flags["compute"] = dict(gradient_checkpointing=1, shared_prompts=shared)
    run(world, tmp_path / "again", **flags)
    assert len(calls) - plain > plain
    same_run(tmp_path / "again", tmp_path / "plain")
    assert run(world, tmp_path / "plain", **flags)["out"].endswith("plain"), "the same run"


def test_a_model_that_cannot_be_checkpointed_is_refused_by_name():
    config = transformers.AutoConfig.for_model("openai-gpt", n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(records.BadInput, match="got OpenAIGPTLMHeadModel"):
        policies.checkpoint_layers(transformers.AutoModelForCausalLM.from_config(config))


# ---- signals that must be zero


def test_a_student_that_is_its_own_teacher_learns_nothing(world, tmp_path):
    """From its scores on disk within the noise of float32; in memory to the bit."""
    scores = tmp_path / "s.jsonl"
    teacher.main(argv("score", model=world.base, rollouts=world.rollouts, out=scores, top_k=V))
    for method, bound in (("opd-full", 1e-5), ("opd", 1e-3)):
        same, numbers = gradient(world, needs(world, method) | dict(scores=scores))
        other, _ = gradient(world, needs(world, method))
        assert float(same.norm()) < bound * float(other.norm())
        assert abs(numbers["train/loss"]) < 1e-5 > abs(numbers["kl/teacher"])
    flags = dict(method="opd-full", rollouts=world.rollouts)
    memory, numbers = gradient(world, flags, teacher=world.base)
    assert numbers["train/loss"] == 0 == float(memory.abs().max())


# ---- rounds


def one_group(world, path):
    """One prompt's rollouts: every optimiser step walks the very same batch in the very same
    order."""
    return dump(path, [r for r in load(world.rollouts) if r["id"] == "t00003"])


def test_the_next_round_continues_the_optimiser_and_the_step_count(world, tmp_path):
    """2 + 2 steps on one fixed batch are 4 steps, to the bit: moments, bias correction, warm-up
    and decay all continue.  (Imitation, which has no importance ratio that starts anew.)"""
    flags = dict(method="sft", rollouts=one_group(world, tmp_path / "r.jsonl"))
    flags |= dict(learning_rate=1e-3)
    flags["optimizer"] = dict(warmup_steps=3, schedule="linear", total_steps=6)

    def go(model, out, **more):
        return train.main(argv(model=model, out=tmp_path / out, **flags | more))

    def log(name, *folders):
        return [m[name] for folder in folders for m in metrics(tmp_path / folder)]

    go(world.base, "four", steps=4, fresh_optimizer=True)
    go(world.base, "two", steps=2, fresh_optimizer=True)
    second = go(tmp_path / "two", "two_two", steps=2)
    assert second["step"] == 4 and second["steps"] == 2
    assert same_bits(weights(tmp_path / "four"), weights(tmp_path / "two_two"))
    for name in ("step", "train/tokens_total"):
        assert log(name, "two", "two_two") == log(name, "four")
    # the decay: steps 4, 5 of 3 + 3, and 0 at the end
    go(tmp_path / "two_two", "third", steps=3)
    rates = log("train/learning_rate", "two", "two_two", "third")
    thirds = np.array(rates) / 1e-3 * 3
    assert thirds == pytest.approx([1, 2, 3, 3, 2, 1, 0], abs=1e-9)
    fresh = go(tmp_path / "two", "fresh", steps=2, fresh_optimizer=True)
    assert fresh["step"] == 2 and moved(tmp_path / "fresh", tmp_path / "two_two") > 1e-5


def test_the_optimiser_is_adamw(world, tmp_path):
    """Three steps against torch's own AdamW driven by the naive gradient: no hidden scaling, no
    lost moment."""
    path = one_group(world, tmp_path / "r.jsonl")
    flags = dict(method="sft", rollouts=path, steps=3, fresh_optimizer=True)
    optimizer = dict(grad_clip=0.5, weight_decay=0.1, adam_beta2=0.95)
    run(world, tmp_path / "m", **flags, optimizer=optimizer)
    model = naive_model(world.base)
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    for row in metrics(tmp_path / "m"):
        flat = naive_gradient(model, METHODS["sft"], flags)
        norm = float(flat.norm())
        assert row["train/grad_norm"] == pytest.approx(norm, rel=1e-4) and norm > 0.5
        clipped = (0.5 / norm * flat).split([p.numel() for p in parameters])
        for p, g in zip(parameters, clipped):
            p.grad = g.view_as(p)
        optimiser.step()
    want, start, got = model.state_dict(), weights(world.base), weights(tmp_path / "m")
    error = sum(float(((got[k] - want[k]) ** 2).sum()) for k in got) ** 0.5
    length = sum(float(((start[k] - want[k]) ** 2).sum()) for k in got) ** 0.5
    # entries whose gradient is nearly zero divide noise by noise in AdamW
    assert error < 0.01 * length


def test_another_method_starts_anew_and_later_steps_remember_the_start(world, tmp_path):
    assert (world.base / "trainer" / "state.json").exists(), "it was trained by sft"
    summary = run(world, tmp_path / "m", learning_rate=3e-3)
    assert summary["step"] == summary["steps"] == 3
    first, *later = metrics(tmp_path / "m")
    for row in (first, *later):
        assert row["rollout/logprob_gap_mean"] < 2e-5, "of the log-probs of the start"
    assert first["policy/kl_from_start"] < 1e-6 < later[0]["policy/kl_from_start"]


# ---- resume


STEPS = 8
RESUME = dict(method="ropd", epochs=2, save_every=1, batch_size=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "m"
    run(world, out, **RESUME)
    assert [m["step"] for m in metrics(out)] == list(range(1, STEPS + 1))
    return out


def same_run(out, uninterrupted):
    assert metrics(out) == metrics(uninterrupted)
    a, b = (sorted(f.rglob("*.safetensors")) for f in (out, uninterrupted))
    assert len(a) == len(b) > 1, "moments too"
    assert all(same_bits(load_file(x), load_file(y)) for x, y in zip(a, b))
    beside = {path.name for path in out.parent.glob(f"{out.name}.*")}
    assert not beside, "neither OUT.partial nor the lock"


class Killed(BaseException):
    """Stands in for a kill at one exact place: nothing in the stage catches it."""


PLACES = {  # what dies: function, on the n-th call (from 0) whose first argument ends like this
    "before the log line": (disk, "append_whole", 3, ""),
    "model half written": (trainers, "save_file", 3, ""),
    "model written, LATEST still old": (disk, "write_atomically", 3, "LATEST"),
    "LATEST new, old checkpoint still there": (shutil, "rmtree", 2, "step-"),
    "everything saved, not yet renamed": (disk, "rename_durably", 0, "/final"),
    "renamed, partial still there": (shutil, "rmtree", 0, ".partial"),
}


def dying(module, name, count, mark=""):
    """The function, dying at its count-th call (from 0) whose first argument ends with mark."""
    real, calls = getattr(module, name), [0]

    def function(*args, **kwargs):
        if str(args[0]).rstrip("0123456789").endswith(mark):
            if calls[0] == count:
                raise Killed
            calls[0] += 1
        return real(*args, **kwargs)

    return function


def killed(world, out, place, monkeypatch, **flags):
    module, name, count, mark = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(module, name, dying(module, name, count, mark))
        with pytest.raises(Killed):
            run(world, out, **flags)


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_and_run_again_ends_in_the_same_bits(
    world, uninterrupted, tmp_path, monkeypatch, place
):
    out = tmp_path / "m"
    killed(world, out, place, monkeypatch, **RESUME)
    renamed = place.startswith("renamed")
    assert out.exists() == renamed
    assert run(world, out, **RESUME)["steps"] == STEPS
    same_run(out, uninterrupted)


def test_bfloat16_resumes_with_its_masters(world, tmp_path, monkeypatch):
    flags = RESUME | dict(dtype="bfloat16", batch_size=4, learning_rate=1e-4)
    run(world, tmp_path / "whole", **flags)
    killed(world, tmp_path / "m", "before the log line", monkeypatch, **flags)
    run(world, tmp_path / "m", **flags)
    same_run(tmp_path / "m", tmp_path / "whole")


def test_a_finished_run_changes_nothing_and_another_one_is_refused(
    world, uninterrupted, capsys
):
    def state():
        found = [p for p in uninterrupted.rglob("*") if p.is_file()]
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in found}

    before = state()
    assert run(world, uninterrupted, **RESUME)["steps"] == STEPS
    for change in (
        dict(learning_rate=2e-3),
        dict(set="tis_cap=0"),
        dict(rollouts=shutil.copy(world.rollouts, uninterrupted.parent / "r.jsonl")),
    ):
        message = refusal(train.main, words(world, uninterrupted, **RESUME | change), capsys)
        assert "holds another training run" in message
    assert state() == before


def test_a_model_whose_config_has_changed_since_is_another_run(world, tmp_path, capsys):
    folder = variant(world.base, tmp_path / "start")
    flags = dict(model=folder, steps=1)
    run(world, tmp_path / "m", **flags)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    message = refusal(train.main, words(world, tmp_path / "m", **flags), capsys)
    assert "holds another training run (config" in message


def test_overwrite_deletes_nothing_but_a_training_run(world, tmp_path, capsys):
    """Neither a folder of somebody's, nor the model it starts from, nor one that holds what the
    run reads, nor anything before the new run's inputs are known to be good."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("x")
    folder = variant(world.base, tmp_path / "start")
    run(world, tmp_path / "m", steps=1)
    inside = dump(tmp_path / "m" / "rollouts.jsonl", load(world.rollouts))
    stale = written_by("1" * 12, world.rollouts)
    for out, flags, complaint in (
        ("notes", {}, "replaces a training run"),
        ("start", dict(method="sft", model=folder), "the model to start from"),
        ("m", dict(rollouts=inside), f"would delete {inside}"),
        ("m", dict(rollouts=stale), "policy.weights"),
    ):
        flags = words(world, tmp_path / out, overwrite=True, **flags)
        assert complaint in refusal(train.main, flags, capsys)
    assert (tmp_path / "notes" / "thesis.txt").exists() and moved(folder, world.base) == 0
    assert inside.exists() and (tmp_path / "m" / "model.safetensors").exists()
    run(world, tmp_path / "m", overwrite=True)
    assert metrics(tmp_path / "m")[-1]["step"] == 3 and not inside.exists()


# ---- the folder


def test_the_saved_folder_is_a_plain_transformers_model(world, tmp_path):
    """It loads and generates.  It has no pickle; servers load every *.safetensors of a folder
    that has no index: the optimiser's state must not be among them."""
    folder = tmp_path / "m"
    run(world, folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == END
    ids = tokenizer("<|user|>3+4=?<|assistant|>", return_tensors="pt")["input_ids"]
    assert len(model.generate(ids, max_new_tokens=10, do_sample=False)[0]) > len(ids[0])
    suffixes = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".jinja"}, suffixes
    for path in folder.glob("*.safetensors"):
        assert set(load_file(path)) <= set(weights(folder)), path.name


def test_bfloat16_keeps_masters_so_that_tiny_steps_add_up(world, tmp_path):
    """12 steps of 1e-5: each is below the spacing of a bfloat16 weight of 0.02 and would be
    rounded away."""
    flags = dict(method="sft", rollouts=one_group(world, tmp_path / "r.jsonl"))
    flags |= dict(dtype="bfloat16", steps=12, learning_rate=1e-5)
    flags["optimizer"] = dict(weight_decay=0.0)
    run(world, tmp_path / "m", **flags, fresh_optimizer=True)
    state = load_file(tmp_path / "m" / "trainer" / "optimizer.safetensors")
    end = weights(tmp_path / "m")
    for name, value in end.items():
        master = state[f"master/{name}"]
        assert master.dtype == torch.float32 and torch.equal(value, master.bfloat16())
    name = "model.layers.0.mlp.gate_proj.weight"
    begun = weights(world.base)[name].bfloat16()
    step = (state[f"master/{name}"] - begun.float()).abs()
    assert 3e-5 < float(step.median()) < 1.3e-4, "about 12 steps of at most 1e-5"
    large = begun.abs() > 0.02  # here half a spacing is at least 6e-5, six steps
    assert float((end[name] != begun)[large].float().mean()) > 0.1


# ---- the plan


def test_the_plan_walks_every_prompt_once_an_epoch():
    plan = batches.plan
    names = [f"p{i}" for i in range(10)]
    for batch in (3, 99):
        steps = plan(names, batch, 2, None, 5)
        flat = [n for s in steps for n in s]
        assert sorted(flat[:10]) == sorted(flat[10:]) == names and max(map(len, steps)) <= batch
        assert flat[:10] != flat[10:]
    # --steps takes as many epochs as it needs
    assert plan(names, 3, 1, 7, 5) == plan(names, 3, 9, None, 5)[:7]
    assert plan(names, 3, 1, None, 5) != plan(names, 3, 1, None, 6)


def test_a_cosine_schedule_at_its_corners():
    settings = trainers.TrainerSettings(2.0, 0, 0, 0, "cosine", 4, None, 1)
    rates = [trainers.learning_rate(settings, step, 14) for step in (0, 9, 14)]
    assert rates == pytest.approx([0.5, 1.0, 0.0], abs=1e-12)
