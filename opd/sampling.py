"""Samples answers, in one piece or in steps with tools, from weights here or from a server.

Every sample draws its own random numbers from (stage, seed, prompt id, sample number).  So the
answers do not depend on batching, on which prompts are asked, or on how often a run was
interrupted (up to the last bit of a batched matrix product).
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from opd import cli, files, records, served
from opd.chat import bare, final_text, render
from opd.kernel import all_logits, lifted
from opd.policy import (
    add_model_flags,
    add_tokenizer_flag,
    check_ids,
    check_tokenizer_flag,
    hidden_at,
    load_policy,
    resume_identity,
    served_policy,
    token_batches,
    vocabulary_size,
)
from opd.records import BadInput
from opd.tools import Episode, Toolbox, ToolOptions

# ---- sampling

BLOCK = 512  # columns of the vocabulary a block in `draw`


def uniforms(seed, prompt_id, sample, count):
    """`count` numbers in [0, 1) that depend on nothing but these names: one for each token a
    sample may need."""
    digest = hashlib.sha256(f"{seed}|{prompt_id}|{sample}".encode()).digest()
    return np.random.Generator(
        np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    ).random(count)


def invert(p, fraction):
    """(index [B], how far into that entry [B], 0 to 1) where the running sum of p [B, V] first
    exceeds `fraction` [B] in [0, 1) of the whole, in float64."""
    cumulative = p.double().cumsum(-1)
    total = cumulative[:, -1:]
    # a product near 1 may round up to the total, which no entry exceeds
    wanted = torch.minimum(fraction[:, None] * total, total.nextafter(0 * total))
    index = torch.searchsorted(cumulative, wanted, right=True).clamp(max=p.shape[-1] - 1)
    above = (cumulative.gather(-1, index) - wanted) / p.gather(-1, index)
    return index[:, 0], (1 - above[:, 0]).clamp(0, 1)


def draw(p, uniform):
    """One column a row, drawn from p [B, V] float32 by inverting its cumulative distribution
    at `uniform` [B]: first a block of columns, then a column of it.

    The running sum over a whole vocabulary of 150,000 would take a third of a step."""
    rows, columns = p.shape
    size = min(BLOCK, columns)
    p = torch.nn.functional.pad(p, (0, -columns % size)).view(rows, -1, size)
    block, left = invert(p.sum(-1), uniform) if columns > size else (0, uniform)
    inside, _ = invert(p[torch.arange(rows, device=p.device), block], left)
    return block * size + inside


def pick(logits, uniform, temperature, top_p):
    """One token a row: (ids [B], logps [B]).

    logits [B, V] float32, uniform [B] float64.  logps are of softmax(logits / temperature),
    whatever top_p is; temperature 0 takes the largest logit and reports its log-prob at
    temperature 1."""
    scaled = logits if temperature in (0, 1) else logits / temperature
    logps = torch.log_softmax(scaled, -1)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        p = logps.exp()
        if top_p < 1:  # keep the likeliest tokens until their mass reaches top_p
            sorted_p, order = p.double().sort(-1, descending=True)
            dropped = sorted_p.cumsum(-1) - sorted_p >= top_p
            p = p.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
        ids = draw(p, uniform)
    return ids, logps.gather(-1, ids[:, None])[:, 0]


@dataclass
class Answer:
    """What was sampled after a prompt, a value a token."""

    response_ids: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    finish_reason: str = "length"
    end_mass: float | None = None  # probability of ending where the last token stands


@dataclass
class Row:
    """A row of a batch: the Answer that it writes, and what it reads before it writes on."""

    index: int  # of its prompt
    draws: np.ndarray  # a uniform for each token that it may write
    limit: int  # tokens after the prompt, read or written
    answer: Answer = field(default_factory=Answer)
    unread: list = field(default_factory=list)  # ids
    written: int = 0  # tokens, in all its Answers
    done: bool = False

    def take(self, token, logp, stop):
        """Its next id: one that it has to read, or else the drawn token, which it writes.
        stop: whether that token ends an answer."""
        if self.unread:
            return self.unread.pop(0)
        self.answer.response_ids.append(token)
        self.answer.logprobs.append(logp)
        self.answer.finish_reason = "stop" if stop else "length"
        self.written += 1
        return token

    def ends(self, tokens):
        """Whether its Answer does, after so many tokens behind the prompt."""
        return self.answer.finish_reason == "stop" or self.limit <= tokens

    def end(self, end_mass, after_step):
        """Ends its Answer; the row is done unless after_step has something to read."""
        self.answer.end_mass = end_mass
        more = after_step(self.index, self.answer) if after_step else None
        self.done = more is None
        if not self.done:
            self.unread = list(more)
            self.answer = Answer()


def left_padded(prompts, device):
    """(ids [B, L], mask [B, L]) of token-id lists:  [[7], [5, 6]] -> [[0, 7], [5, 6]]."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def next_logits(policy, head, ids, mask, position, cache):
    """(float32 logits [B, V] after the last column of ids, as the trainer computes them; the
    cache).  head: of the policy, in the type that its products are computed in."""
    if cache is not None and not policy.attends:
        mask = None  # a recurrent state holds no padding; Mamba would read the mask as inputs
    step = policy.model.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=position, cache=cache, use_cache=True
    )
    last = step.last_hidden_state[:, -1].to(policy.head.dtype).to(head.dtype)
    return all_logits(last, head, **policy.head_options), step.cache


@torch.no_grad()
def sample_batch(policy, prompts, draws, *, max_tokens, temperature, top_p, after_step=None):
    """An Answer to each of a batch of token-id prompts.

    draws [B, longest] of uniforms; max_tokens: a number, or one a row.  Prompts are padded on
    the left, and read once for all their answers; a row leaves the batch when it stops.

    after_step: called with a row's index and its Answer when that ends.  It returns None, or
    ids that the row then reads before it writes another Answer; they and a token more must fit
    max_tokens.  What is returned are the last Answers.  The cache stays, so that nothing is
    read twice, and ids are read one a step, while other rows write."""
    device = policy.device
    place = {}  # of each different prompt
    copies = [place.setdefault(tuple(prompt), len(place)) for prompt in prompts]
    copies = torch.tensor(copies, device=device)
    ids, mask = left_padded(list(place), device)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    limits = np.broadcast_to(max_tokens, len(prompts)).tolist()
    rows = [Row(i, draws[i], limits[i]) for i in range(len(prompts))]
    stops = torch.tensor(policy.stop_ids, dtype=torch.int64, device=device)
    head = lifted(policy.head)
    cache = None
    batch = rows  # those that are not done
    for t in cli.progress(range(max(limits)), desc=f"{len(rows)} answers", unit="token"):
        logits, cache = next_logits(policy, head, ids, mask, position, cache)
        if t == 0 and len(place) < len(prompts):
            logits, mask, position = (each[copies] for each in (logits, mask, position))
            cache.reorder_cache(copies)
        uniform = [row.draws[row.written] for row in batch]
        uniform = torch.tensor(uniform, dtype=torch.float64, device=device)
        tokens, logps = pick(logits, uniform, temperature, top_p)
        if not torch.isfinite(logps).all():
            raise BadInput(
                "the model's logits are not finite: try --dtype float32, or another checkpoint"
            )
        drawn = zip(tokens.tolist(), logps.tolist(), torch.isin(tokens, stops).tolist())
        taken = [row.take(*each) for row, each in zip(batch, drawn)]
        ending = [i for i, row in enumerate(batch) if row.ends(t + 1)]
        for i, share in zip(ending, stop_mass(logits[ending], stops)):
            batch[i].end(share, after_step)
        going = [i for i, row in enumerate(batch) if not row.done]
        if not going:
            break
        if len(going) < len(batch):
            cache.reorder_cache(torch.tensor(going, device=device))
            mask, position = mask[going], position[going]
            batch = [batch[i] for i in going]
            taken = [taken[i] for i in going]
        ids = torch.tensor(taken, device=device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position[:, -1:] + 1
    return [row.answer for row in rows]


def stop_mass(logits, stops):
    """List of the probabilities of a token of `stops`, under logits [B, V]."""
    return (logits[:, stops].logsumexp(-1) - logits.logsumexp(-1)).exp().tolist()


def check_cache(policy):
    """Refuses a model whose cached steps are not its plain forward pass: one without a cache,
    or whose state does not follow the rows that are copied and that stay in a batch."""
    prompts = [[min(i, policy.vocabulary - 1) for i in range(n)] for n in (1, 3, 2, 3)]
    tolerance = 0.01 if policy.head.dtype == torch.float32 else 0.5  # nats
    try:
        answers = sample_batch(
            policy, prompts, np.zeros((4, 3)), max_tokens=[3, 1, 2, 3], temperature=0, top_p=1
        )
        ids = [answer.response_ids for answer in answers]
        at = [range(len(p) - 1, len(p) + len(new) - 1) for p, new in zip(prompts, ids)]
        hidden = hidden_at(policy.model, [p + new for p, new in zip(prompts, ids)], at)
        logps = all_logits(hidden, policy.head, **policy.head_options).log_softmax(-1)
        chosen = logps.gather(-1, torch.tensor(sum(ids, []), device=logps.device)[:, None])
        own = torch.tensor(sum([answer.logprobs for answer in answers], []))
        gap = float((own - chosen[:, 0].cpu()).abs().max())
    except BadInput:
        raise
    except Exception as error:  # a model's own code raises what it likes
        gap = f"{type(error).__name__}: {error}"
    if isinstance(gap, str) or not gap <= tolerance:
        raise BadInput(
            f"{policy.identity['model']}: expected a cache whose steps are the plain forward "
            f"pass, got {gap if isinstance(gap, str) else f'log-probs off by {gap:.3g}'}: "
            f"sample from a server (--base-url)"
        )


def sample_episodes(policy, prompts, draws, toolbox, names, *, max_tokens, temperature, top_p):
    """An Episode for each prompt: like sample_batch, step by step with tools between.

    names: one a row, which the keys of its calls begin with.  max_tokens bounds the whole
    response, with the tools' outputs; an output that would not fit is left out and the episode
    ends there.  draws are of sampled tokens only."""
    episodes = [Episode() for _ in prompts]

    def after_step(row, answer):
        episode = episodes[row]
        read = prompts[row] + episode.response_ids
        episode.final = final_text(policy.tokenizer, read, answer.response_ids)
        episode.add_step(answer.response_ids, answer.logprobs)
        episode.finish_reason = answer.finish_reason
        episode.end_mass = answer.end_mass
        end = len(episode.response_ids)
        if toolbox.answer_call(policy, episode, names[row], max_tokens):
            return episode.response_ids[end:]
        return None

    how = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    sample_batch(policy, prompts, draws, **how, after_step=after_step)
    return episodes


# ---- records


def rollout_record(prompt, sample, identity, distribution, answer):
    """A rollouts record.  distribution: the temperature and top_p that it claims; answer: the
    fields of an Answer or Episode with `text`, `final` and `prompt_ids`, or a server's reply,
    which may hold neither ids nor log-probs."""
    record = {
        "id": prompt["id"],
        "sample": sample,
        "policy": identity,
        "text": answer["text"],
        "finish_reason": answer["finish_reason"],
        **distribution,
    }
    if "response_ids" in answer:
        record |= {
            "prompt_ids": answer["prompt_ids"],
            "response_ids": answer["response_ids"],
            "loss_mask": answer.get("loss_mask") or [1] * len(answer["response_ids"]),
            "logprobs": records.floats(np.minimum(answer["logprobs"], 0)),
        }
    if "steps" in answer:
        record |= {name: answer[name] for name in ("steps", "calls")}
    if "steps" in answer or answer.get("final", answer["text"]) != answer["text"]:
        record["final"] = answer["final"]
    # a server does not say
    if answer.get("end_mass") is not None:
        record["end_mass"] = float(f"{answer['end_mass']:.6g}")
    return record


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_tokens: int = 16384

    def __post_init__(self):
        warm = records.TEMPERATURE
        if self.max_tokens < 1 or not warm.test(self.temperature) or not 0 < self.top_p <= 1:
            raise BadInput(
                f"expected --max-tokens of at least 1, --temperature {warm.expected} and "
                f"--top-p in (0, 1], got {self.max_tokens}, {self.temperature} and {self.top_p}"
            )

    def distribution(self):
        return {"temperature": self.temperature, "top_p": self.top_p}


class LocalSampler:
    """Samples from weights in this process.  Called with jobs, (prompts record, sample number)
    pairs, it yields lists of rollout records, a batch at a time."""

    def __init__(self, policy, settings, toolbox=None):
        self.policy = policy
        self.settings = settings
        self.toolbox = toolbox
        self.identity = policy.identity
        check_cache(policy)
        self.begun = {}  # prompt id: the ids it has been shown as

    def __call__(self, jobs):
        max_tokens = self.settings.max_tokens
        # a block at a time, so that a million prompts are not rendered at once
        for start in range(0, len(jobs), 4096):
            block = jobs[start : start + 4096]
            rendered = {}
            for prompt, _ in block:
                if prompt["id"] not in rendered:
                    rendered[prompt["id"]] = self.prompt_ids(prompt)
            lengths = [len(rendered[prompt["id"]]) + max_tokens for prompt, _ in block]
            for batch in token_batches(lengths, self.settings.batch_tokens):
                yield self.answer([block[i] for i in batch], rendered)
            # its other samples may stand in the next block, and a template may write the time
            last = block[-1][0]["id"]
            self.begun[str(last)] = rendered[last]

    def prompt_ids(self, prompt):
        options = self.policy.template_options
        if str(prompt["id"]) in self.begun:
            ids = self.begun[str(prompt["id"])]
        elif self.toolbox:
            ids = self.toolbox.prompt(self.policy.tokenizer, prompt, options)
        else:
            ids = render(self.policy.tokenizer, prompt, options)
        check_ids(ids, f"prompt {prompt['id']!r}", self.policy.vocabulary, self.identity)
        longest = len(ids) + self.settings.max_tokens
        self.policy.check_length(longest, f"prompt {prompt['id']!r} with --max-tokens")
        return ids

    def answer(self, jobs, rendered):
        """The records of one batch."""
        s = self.settings
        how = {"max_tokens": s.max_tokens} | s.distribution()
        prompts = [rendered[prompt["id"]] for prompt, _ in jobs]
        draws = np.stack([uniforms(s.seed, p["id"], n, s.max_tokens) for p, n in jobs])
        if self.toolbox:
            names = [f"{s.seed}|{prompt['id']}|{sample}" for prompt, sample in jobs]
            answers = sample_episodes(self.policy, prompts, draws, self.toolbox, names, **how)
        else:
            answers = sample_batch(self.policy, prompts, draws, **how)
        made = []
        for (prompt, sample), prompt_ids, answer in zip(jobs, prompts, answers):
            ids = answer.response_ids
            text = self.policy.tokenizer.decode(ids, skip_special_tokens=True)
            final = final_text(self.policy.tokenizer, prompt_ids, ids)
            fields = {"prompt_ids": prompt_ids, "text": text, "final": final} | vars(answer)
            made.append(rollout_record(prompt, sample, self.identity, s.distribution(), fields))
        return made


class ServedSampler:
    """The same from a server: yields a record, or the ServedFailure of one that failed after
    all retries.

    tokenizer: for training; the server's prompt ids must then be those that its template gives
    here.  None: texts alone."""

    def __init__(self, server, settings, identity, tokenizer, template_options):
        self.server = server
        self.settings = settings
        self.identity = identity
        self.tokenizer = tokenizer
        self.template_options = template_options
        self.begun = {}

    def __call__(self, jobs):
        for (prompt, sample), answer in self.server.map(self.ask, jobs):
            if self.tokenizer is not None and isinstance(answer, dict):
                answer = self.mismatch(prompt, answer) or answer
            if isinstance(answer, served.ServedFailure):
                yield answer
                continue
            if self.tokenizer is not None:
                ids = answer["prompt_ids"], answer["response_ids"]
                answer["final"] = final_text(self.tokenizer, *ids)
            # --request-json may leave out a temperature: then none is claimed
            sent = self.server.sent(**self.settings.distribution())
            yield rollout_record(prompt, sample, self.identity, sent, answer)

    def ask(self, job):
        prompt, sample = job
        name = f"{self.settings.seed}|{prompt['id']}|{sample}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") >> 1
        return self.server.sample(
            prompt.get("messages") or prompt["prompt"],
            max_tokens=self.settings.max_tokens,
            seed=seed,
            need_tokens=self.tokenizer is not None,
            template_options=self.template_options,
            **self.settings.distribution(),
        )

    def mismatch(self, prompt, answer):
        """The ServedFailure of an answer whose ids are not what was asked, or not its text."""
        got = answer["prompt_ids"]
        name = str(prompt["id"])
        expected = self.begun.get(name)
        expected = expected or render(self.tokenizer, prompt, self.template_options)
        if got != expected:
            return served.ServedFailure(
                f"prompt {prompt['id']!r}: the server was given {len(got)} tokens, but the "
                f"template of {self.identity['model']} renders {len(expected)} others: it "
                f"serves another tokenizer or chat template, or needs other --template-options"
            )
        text = self.tokenizer.decode(answer["response_ids"], skip_special_tokens=True)
        if bare(text) != bare(answer["text"]):
            return served.ServedFailure(
                f"text: expected what token_ids spell, {text[:60]!r}, got "
                f"{answer['text'][:60]!r}: it serves another tokenizer, or cuts texts (`stop`, "
                f"--reasoning-parser)"
            )
        self.begun[name] = expected  # a template may write the time
        return None


# ---- what the stages that sample share

# Added to --seed, so that under one seed a teacher does not draw the numbers of the rollouts,
# nor an evaluation those that were trained on.
ROLLOUT_STREAM = 0
ANSWER_STREAM = 10**6
EVAL_STREAM = 2 * 10**6


def add_sampling_flags(p, n):
    p.add_argument(
        "--model",
        required=True,
        help="folder, Hugging Face id, or the name a server knows the model by",
    )
    p.add_argument("--prompts", required=True, help="JSONL of prompts")
    p.add_argument("--n", type=int, default=n, help="answers per prompt")
    p.add_argument(
        "--out", required=True, help="JSONL to write; run again to complete an interrupted file"
    )
    p.add_argument(
        "--max-tokens",
        type=int,
        default=Sampling.max_tokens,
        help="longest answer, tools' outputs included; a cut one ends in finish_reason "
        "`length`",
    )
    p.add_argument(
        "--temperature",
        type=float,
        default=Sampling.temperature,
        help="0 is greedy (evaluation); for training 1 with scores, of a teacher or a "
        "reference, any above 0 with rewards alone",
    )
    p.add_argument(
        "--top-p",
        type=float,
        default=Sampling.top_p,
        help="nucleus mass; below 1 is for evaluation, and for a teacher's answers",
    )
    p.add_argument(
        "--seed",
        type=int,
        default=Sampling.seed,
        help="with the stage, the prompt id and the sample number, fixes every answer",
    )
    p.add_argument(
        "--batch-tokens",
        type=int,
        default=Sampling.batch_tokens,
        help="rows x (prompt + max-tokens) held at once: memory against speed",
    )
    p.add_argument(
        "--tools",
        metavar="NAME,...",
        help="calculator, or MODULE:CLASS of your own, which the model may call; with options "
        """as JSON: '{"calculator": {"outage": 0.2}}' (opd/tools.py)""",
    )
    p.add_argument(
        "--tool-options",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="call_format (hermes, json or brackets) is how the model writes a call; max_calls "
        "(16) of an episode: one more ends it in finish_reason `tool_limit`",
    )
    add_model_flags(p)
    add_tokenizer_flag(p)
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    served.add_flags(p)


def toolbox_from_flags(args):
    """The Toolbox of --tools, or None."""
    if not args.tools and args.tool_options:
        raise BadInput("--tool-options: expected --tools beside it")
    if not args.tools:
        return None
    options = ToolOptions()
    for text in args.tool_options:
        options = cli.changed_field(options, "--tool-options", text)
    return Toolbox(args.tools, options.call_format, options.max_calls)


def sampler_from_flags(args, need_tokens, stream):
    """(sampler, settings that determine its answers)."""
    settings = Sampling(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed + stream,
        batch_tokens=args.batch_tokens,
    )
    toolbox = toolbox_from_flags(args)
    if args.base_url:
        if toolbox:
            raise BadInput(
                "--tools: run beside weights that are loaded here, expected no --base-url with "
                "it"
            )
        tokenizer, identity = served_policy(args.model, args.tokenizer, args.template_options)
        if need_tokens and tokenizer is None:
            raise BadInput(
                f"--model {args.model}: give its folder with --tokenizer: token ids without "
                f"a vocabulary and template cannot be trained on "
                f"(texts alone: teacher.py answer)"
            )
        server = served.Server.from_flags(args)
        if need_tokens:
            server.vocabulary = vocabulary_size(tokenizer)
        sampler = ServedSampler(
            server,
            settings,
            identity,
            tokenizer if need_tokens else None,
            args.template_options,
        )
    else:
        check_tokenizer_flag(args.tokenizer, args.base_url)
        policy = load_policy(args.model, args.dtype, args.device, args.template_options)
        sampler = LocalSampler(policy, settings, toolbox)
    determined_by = {
        "policy": resume_identity(sampler.identity),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
        "seed": settings.seed,
        "dtype": args.dtype,
        "served": bool(args.base_url),
    }
    if toolbox:
        determined_by["tools"] = toolbox.settings
    if args.base_url and sampler.server.fields:
        determined_by["request"] = sampler.server.fields
    return sampler, determined_by


def fill_from_flags(args, kind, stream):
    """Completes the file --out with --n answers to each prompt: what rollout.py, teacher.py
    answer and eval.py --model do.  Returns (records in the file, failures)."""
    jobs = jobs_by_key(files.read(args.prompts, "prompts"), args.n)
    sampler, settings = sampler_from_flags(args, kind == "rollouts", stream)
    how = dict(overwrite=args.overwrite, limit=served.failure_limit(args))
    return fill_with(sampler, jobs, args.out, kind, settings, [args.prompts], **how)


def fill_with(sampler, jobs, out, kind, settings, inputs, **how):
    """Completes the file `out` with a sampler's answers to jobs of `jobs_by_key`.  The other
    arguments, and what is returned, are those of files.fill."""

    def work(missing):
        sampler.begun = begun_prompts(out, kind, {prompt_id for prompt_id, _ in missing})
        return sampler([jobs[key] for key in missing])

    # fill asks for the keys (id, sample) that `out` lacks and appends what the sampler yields
    return files.fill(out, kind, jobs, work, settings, inputs, **how)


def begun_prompts(path, kind, wanted):
    """{prompt id: its token ids in the records of `path`} of the prompts `wanted`.  A template
    that writes the date would show a later sample another prompt."""
    if not Path(path).stat().st_size:
        return {}
    found = {}
    for record in files.read(path, kind, unfinished=True):
        prompt_id = str(record["id"])
        if prompt_id in wanted and record.get("prompt_ids"):
            found[prompt_id] = record["prompt_ids"]
    return found


def jobs_by_key(prompts, n):
    """{(id, sample): (prompts record, sample number)} of n answers to each prompt."""
    if n < 1:
        raise BadInput(f"--n: expected at least 1, got {n}")
    return {(str(p["id"]), sample): (p, sample) for p in prompts for sample in range(n)}
