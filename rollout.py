"""Stage 1: the student answers the prompts.  On-policy data is what this file writes.

    python rollout.py --model runs/toy/student --prompts runs/toy/train.jsonl --n 8 --out
    rollouts.jsonl
    python rollout.py --model NAME --tokenizer FOLDER --base-url http://localhost:8000/v1
    --prompts P --n 8 --out rollouts.jsonl
    python rollout.py --model M --prompts P --tools calculator --out rollouts.jsonl          #
    an agent: tools.py

Reads prompts (`id`, `messages` or `prompt`), writes one rollout a line: the sampled token ids,
their log-probs under the distribution they were sampled from, a loss mask, the text, and the
policy (model, hash of weights and template).

What makes a rollout fit for training, and why each of these is recorded here and not guessed
later:
- ids, not text: decoding and encoding again changes tokens.  An end token is part of the answer
  iff it was sampled.
- the mask comes from lengths, never from `ids == pad`: models whose pad token is their end
  token must learn to stop.
- log-probs are of softmax(logits / temperature) in float32.  `--top-p` below 1 samples from
  less than that, which
  is fine for evaluation; train.py refuses such rollouts for methods that divide by these
  probabilities.

Every sample draws its own random numbers from (--seed, prompt id, sample number).  So the
answers do not depend on batching, sharding, or on how often the run was interrupted (up to the
last bit of a batched matrix product).

With --tools an answer is an episode of several steps, with what the tools said between them.
`response_ids` then holds all of it, `loss_mask` is 0 on what the model has not written, `steps`
says where it wrote and whether the call there had a result ([start, end, true | false | null:
no call, or none that was answered]), `calls` what was asked and said, `final` is the text of
the last step, which is the answer.

Simplifications: 1. no prefix sharing between the n samples of a prompt; 2. no speculative
decoding, no paged cache: for large models serve them with vLLM and use --base-url; 3. every
step of an episode reads its whole context anew.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

import records
import served
from kernel import all_logits
from records import BadInput
from tools import FORMATS, Toolbox, call_use

# ---- a policy in memory


class Policy:
    """A causal language model with its tokenizer, its head as a plain matrix, and its identity.

    `identity` = {"model", "weights", "template", "vocabulary"}: the name and three short
    hashes.  Equal `weights` means the very same parameters; equal `vocabulary` means the same
    token -> id map, whatever the size of the embedding."""

    def __init__(self, model, tokenizer, name, weights, template_options=None):
        self.model, self.tokenizer = model, tokenizer
        self.template_options = template_options or {}
        self.identity = identity_of(name, weights, tokenizer, self.template_options)
        self.stop_ids = stop_ids(model, tokenizer)
        self.vocabulary = vocabulary_size(tokenizer)
        self.head_options = {"vocabulary": self.vocabulary} | head_options(
            model, self.vocabulary
        )

    @property
    def device(self):
        return self.head.device

    @property
    def head(self):
        """The language-model head, [V, D]; kernel.py's functions take it with `head_options`.
        Its rows beyond the vocabulary (embeddings are often padded to a round number) are no
        tokens: they take no probability, in sampling, scoring and training alike."""
        return self.model.get_output_embeddings().weight


def load_policy(name, dtype="auto", device=None, template_options=None, weights=None):
    """Loads a folder, or a Hugging Face id through the hub's cache, as a Policy in evaluation
    mode.

    dtype: "auto" (as stored), "float32", "bfloat16" or "float16"; device: "cpu", "cuda", ...
    (default: GPU if any); weights: the hash of its weight files, where the caller has computed
    it already."""
    folder = find_folder(name)
    model = load_weights(name, folder, "AutoModelForCausalLM", dtype, device)
    return Policy(
        model, load_tokenizer(folder), name, weights or hash_weights(folder), template_options
    )


def load_weights(name, folder, kind, dtype, device, **options):
    """A transformers model of class `kind` from the safetensors of a folder, in evaluation
    mode; `name` is what an error calls it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not list(folder.glob("*.safetensors")):
        raise BadInput(
            f"--model {name}: expected safetensors weights in {folder}, found none (pickled "
            f"weights are never loaded)"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return (
            getattr(transformers, kind)
            .from_pretrained(
                folder,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                **options,
            )
            .to(device)
            .eval()
        )
    # truncated or foreign files, no such device
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"--model {name}: could not be loaded: {error}") from None


def load_tokenizer(name):
    """The tokenizer of a folder or Hugging Face id."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(find_folder(name))
    except (OSError, ValueError) as error:
        raise BadInput(f"tokenizer of {name}: could not be loaded: {error}") from None


def find_folder(name):
    """The local folder of a model given as a folder or as a Hugging Face id."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise BadInput(
                f"--model {name}: expected a transformers model folder, but it has no "
                f"config.json"
            )
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            )
        )
    # the hub raises a dozen unrelated types: bad name, no such repository, no network
    except Exception as error:
        raise BadInput(
            f"--model {name}: neither a folder here nor a model the hub could give "
            f"({type(error).__name__})"
        ) from None


def hash_weights(folder):
    """Short sha256 over the weight files of a model folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:12]


def identity_of(name, weights, tokenizer, template_options):
    """The `policy` object of a record."""

    def short(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

    return {
        "model": str(name),
        "weights": weights,
        "template": short([tokenizer.chat_template, template_options]),
        "vocabulary": short(tokenizer.get_vocab()),
    }


def vocabulary_size(tokenizer):
    """One more than the largest token id; not len(tokenizer), for ids may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def check_tokens(rollout, where, identity, vocabulary, fields=("vocabulary", "template")):
    """Raises BadInput unless a model with this identity reads the rollout's ids as the tokens
    they are."""
    came = rollout["policy"]
    for field in fields:
        if came.get(field) != identity[field]:
            raise BadInput(
                f"{where}: policy.{field}: expected {identity[field]}, that of "
                f"{identity['model']}, came {came.get(field)}: the rollouts were "
                "sampled with another tokenizer or chat template, and their ids mean "
                "something else to this model"
            )
    if max(rollout["prompt_ids"] + rollout["response_ids"]) >= vocabulary:
        raise BadInput(
            f"{where}: response_ids: expected ids below {vocabulary}, the vocabulary of "
            f"{identity['model']}, came one beyond it"
        )


def stop_ids(model, tokenizer):
    """The ids that end an answer: the generation config's (an id or a list) and the tokenizer's
    end token."""
    ids = model.generation_config.eos_token_id
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    return sorted(set(ids) | ({tokenizer.eos_token_id} - {None}))


@torch.no_grad()
def head_options(model, vocabulary):
    """{"scale", "softcap"} with which kernel.py's logits are this model's own.

    Architectures use one name for a factor and for a divisor, so the candidates that the config
    names are tried on a few tokens. A head that does anything else (a bias, a LoRA adapter, a
    second matrix) is refused, not approximated."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(head) is not torch.nn.Linear:
        raise BadInput(
            f"model head: expected a plain torch.nn.Linear, came {type(head).__name__}"
        )
    if len(head.weight) < vocabulary:
        raise BadInput(
            f"model head: expected a row for each of the tokenizer's {vocabulary} tokens, "
            f"came {len(head.weight)}"
        )
    if head.bias is not None:
        raise BadInput(
            "model head: has a bias, which the fused log-prob kernel does not handle"
        )
    ids = torch.arange(min(8, vocabulary), device=head.weight.device)[None]
    own, hidden = (
        model(input_ids=ids).logits[0].float(),
        model.get_decoder()(input_ids=ids).last_hidden_state[0],
    )
    factors = [
        getattr(config, name, None)
        for name in ("logit_scale", "logits_scaling", "lm_head_multiplier")
    ]
    scales = [1.0] + [
        f
        for factor in factors
        if isinstance(factor, (int, float)) and factor
        for f in (factor, 1 / factor)
    ]
    candidates = [
        {"scale": scale, "softcap": cap}
        for cap in (getattr(config, "final_logit_softcapping", None) or None, None)
        for scale in scales
    ]
    errors = [
        (all_logits(hidden, head.weight, **candidate).float() - own).abs().max().item()
        for candidate in candidates
    ]
    best = min(range(len(errors)), key=lambda i: (not math.isfinite(errors[i]), errors[i]))
    if not errors[best] <= 0.02 * (own.abs().max().item() + 1) and torch.isfinite(own).all():
        raise BadInput(
            f"model head: its logits are not hidden @ head.T, scaled or soft-capped as its "
            f"config says (off by {errors[best]:.3g}): it does "
            "something that the fused log-prob kernel does not handle"
        )
    return candidates[best]


def render(tokenizer, prompt, template_options=None):
    """The token ids the model is shown for a prompts record: chat template plus generation
    prompt, or plain text.

    Messages that end with one of the assistant's are a beginning: the model goes on where it
    stops (and the rollout holds what it adds)."""
    if "messages" in prompt and tokenizer.chat_template is None:
        raise BadInput(
            f"prompt {prompt['id']!r}: has messages, but the model's tokenizer has no chat "
            f"template; use `prompt`"
        )
    try:
        if "messages" in prompt:
            # an answer to be continued
            begun = prompt["messages"][-1:] and prompt["messages"][-1]["role"] == "assistant"
            text = tokenizer.apply_chat_template(
                prompt["messages"],
                add_generation_prompt=not begun,
                continue_final_message=bool(begun),
                tokenize=False,
                **(template_options or {}),
            )
            # the template has placed them already
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt["prompt"])["input_ids"]
    # templates raise what they like, tokenizers TypeError on half a surrogate pair
    except Exception as error:
        raise BadInput(
            f"prompt {prompt['id']!r}: could not be rendered ({type(error).__name__}: {error})"
        ) from None
    if not ids:
        raise BadInput(f"prompt {prompt['id']!r}: expected at least one token, but it is empty")
    return ids


# ---- batches and forward


def token_batches(lengths, budget):
    """Indices grouped so that (rows x longest row) of a group is at most `budget`, longest
    first.

    token_batches([3, 9, 4], 10) -> [[1], [2, 0]].  A row longer than the budget gets a batch of
    its own."""
    batches, widest = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * widest <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            widest = max(1, lengths[i])
    return batches


def hidden_at(model, sequences, positions):
    """Last hidden states at chosen positions, [sum of len(positions[i]), D], sequence by
    sequence.

    The state at position t predicts token t + 1: to score the answer [c, d] of prompt [a, b],
    sequence [a, b, c, d], ask for positions [1, 2].  Right padding; the attention mask comes
    from the lengths."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    flat = torch.tensor(
        [row * width + p for row, at in enumerate(positions) for p in at], dtype=torch.int64
    )
    # a classifier has no output embeddings
    device = (model.get_output_embeddings() or model.get_input_embeddings()).weight.device
    padded = None if bool(mask.all()) else mask.to(device)
    hidden = model.get_decoder()(
        input_ids=ids.to(device), attention_mask=padded, use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1)[flat.to(device)]


def response_positions(prompt_ids, loss_mask):
    """Where the hidden states stand that predict the loss-bearing response tokens (mask 1)."""
    return [len(prompt_ids) - 1 + t for t, m in enumerate(loss_mask) if m]


def likeliest(policy, hidden, k):
    """Ids of the k likeliest tokens (at most the whole vocabulary) after each hidden state, [N,
    k], best first.

    Finding them needs the logits; a slice of tokens at a time keeps those small."""
    slices = hidden.split(max(1, (32 << 20) // policy.vocabulary))
    return torch.cat(
        [
            all_logits(h, policy.head, **policy.head_options)
            .topk(min(k, policy.vocabulary))
            .indices
            for h in slices
        ]
    )


# ---- sampling


def uniforms(seed, prompt_id, sample, count):
    """`count` numbers in [0, 1) that depend on nothing but these names: one for each token a
    sample may need."""
    digest = hashlib.sha256(f"{seed}|{prompt_id}|{sample}".encode()).digest()
    return np.random.Generator(
        np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    ).random(count)


def pick(logits, uniform, temperature, top_p):
    """One token a row by inverting the cumulative distribution at `uniform`: (ids [B], logps
    [B]).

    logits [B, V] float32, uniform [B] float64.  logps are of softmax(logits / temperature),
    whatever top_p is; temperature 0 takes the largest logit and reports its log-prob at
    temperature 1."""
    logps = torch.log_softmax(logits / temperature if temperature > 0 else logits, -1)
    if temperature == 0:
        ids = logits.argmax(-1)
    else:
        p = logps.exp().double()
        if top_p < 1:  # keep the likeliest tokens until their mass reaches top_p
            sorted_p, order = p.sort(-1, descending=True)
            dropped = sorted_p.cumsum(-1) - sorted_p >= top_p
            p = p.masked_fill(dropped.gather(-1, order.argsort(-1)), 0.0)
        cumulative = p.cumsum(-1)
        ids = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[
            :, 0
        ].clamp(max=p.shape[-1] - 1)
    return ids, logps.gather(-1, ids[:, None])[:, 0]


@torch.no_grad()
def sample_batch(policy, prompts, draws, *, max_tokens, temperature, top_p):
    """Answers for a batch of token-id prompts: a list of (response_ids, logprobs,
    finish_reason, mass on ending at the last token).

    draws [B, longest] of uniforms; max_tokens: a number, or one a row.  Prompts are padded on
    the left; a row leaves the batch when it stops."""
    model, device = policy.model, policy.device
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask, draws = ids.to(device), mask.to(device), torch.as_tensor(draws, device=device)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    out = [([], [], "length", None) for _ in prompts]
    # rows: which answer each row of the shrinking batch belongs to
    rows, cache = np.arange(len(prompts)), None
    stops = torch.tensor(
        [i for i in policy.stop_ids if i < policy.vocabulary], dtype=torch.int64, device=device
    )
    limits = torch.tensor(
        [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens,
        device=device,
    )
    for t in range(int(limits.max())):
        step = model.get_decoder()(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position,
            cache=cache,
            use_cache=True,
        )
        cache = step.cache
        # float32, as the trainer computes them
        last = all_logits(step.last_hidden_state[:, -1], policy.head, **policy.head_options)
        tokens, logps = pick(last, draws[rows, t], temperature, top_p)
        if not torch.isfinite(logps).all():
            raise BadInput(
                "the model's logits are not finite: try --dtype float32, or another checkpoint"
            )
        stopped = torch.isin(tokens, stops)
        ends = (last[:, stops].logsumexp(-1) - last.logsumexp(-1)).exp()  # mass on ending here
        for row, token, logp, stop, end in zip(
            rows, tokens.tolist(), logps.tolist(), stopped.tolist(), ends.tolist()
        ):
            out[row][0].append(token)
            out[row][1].append(logp)
            out[row] = (*out[row][:2], "stop" if stop else "length", end)
        stopped |= limits <= t + 1
        if stopped.any():
            going = (~stopped).nonzero()[:, 0]
            if not len(going):
                break
            cache.reorder_cache(going)  # which layers with a recurrent state have, too
            tokens, mask, position, limits, rows = (
                tokens[going],
                mask[going],
                position[going],
                limits[going],
                rows[going.cpu().numpy()],
            )
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        position = position[:, -1:] + 1
    return out


def sample_episodes(policy, prompts, draws, toolbox, names, *, max_tokens, temperature, top_p):
    """Like sample_batch, step by step with tools between: a list of dicts for rollout_record.

    names: one a row, which the keys of its calls begin with.  max_tokens bounds the whole
    response, with the tools' text; an output that would not fit is left out and the episode
    ends there.  draws are of sampled tokens only."""
    episodes = [
        {"response_ids": [], "logprobs": [], "loss_mask": [], "steps": [], "calls": []}
        for _ in prompts
    ]
    going = list(range(len(prompts)))
    while going:
        limits, parts = [max_tokens - len(episodes[i]["response_ids"]) for i in going], []
        for i, limit in zip(going, limits):
            used = sum(episodes[i]["loss_mask"])
            parts.append(np.pad(draws[i, used : used + limit], (0, max(limits) - limit)))
        answers = sample_batch(
            policy,
            [prompts[i] + episodes[i]["response_ids"] for i in going],
            np.stack(parts),
            max_tokens=limits,
            temperature=temperature,
            top_p=top_p,
        )
        again = []
        for i, (ids, logps, reason, mass) in zip(going, answers):
            e = episodes[i]
            start, call = (
                len(e["response_ids"]),
                toolbox.find(policy.tokenizer.decode(ids)) if reason == "stop" else None,
            )
            e["response_ids"] += ids
            e["logprobs"] += logps
            e["loss_mask"] += [1] * len(ids)
            e["steps"].append([start, len(e["response_ids"]), None])
            e |= {
                "finish_reason": reason,
                "end_mass": mass,
                "final": policy.tokenizer.decode(ids, skip_special_tokens=True),
            }
            if call and len(e["calls"]) == toolbox.most_calls:
                e["finish_reason"] = "tool_limit"
            elif call:
                call = toolbox.run(call, f"{names[i]}|{len(e['calls'])}")
                turn = toolbox.turn(policy, call)
                if len(e["response_ids"]) + len(turn) >= max_tokens:
                    e["finish_reason"] = "length"
                    continue
                e["response_ids"] += turn
                e["logprobs"] += [0.0] * len(turn)  # nobody sampled these
                e["loss_mask"] += [0] * len(turn)
                e["steps"][-1][2] = call["ok"]
                e["calls"].append(call)
                again.append(i)
        going = again
    return episodes


def generate(policy, jobs, *, max_tokens, temperature, top_p, seed, batch_tokens, toolbox=None):
    """Yields lists of rollout records, a batch at a time.  jobs: list of (prompts record,
    sample number)."""
    limit = getattr(
        policy.model.config.get_text_config(), "max_position_embeddings", None
    ) or float("inf")
    # a block at a time, so that a million prompts are not rendered at once
    for start in range(0, len(jobs), 4096):
        block, rendered = jobs[start : start + 4096], {}
        for prompt, _ in block:
            if prompt["id"] not in rendered:
                asked = policy.tokenizer, prompt, policy.template_options
                rendered[prompt["id"]] = (
                    toolbox.prompt(render, *asked) if toolbox else render(*asked)
                )
                if len(rendered[prompt["id"]]) + max_tokens > limit:
                    raise BadInput(
                        f"prompt {prompt['id']!r}: its {len(rendered[prompt['id']])} tokens "
                        f"and --max-tokens {max_tokens} pass the model's "
                        f"{limit} positions"
                    )
        for batch in token_batches(
            [len(rendered[p["id"]]) + max_tokens for p, _ in block], batch_tokens
        ):
            todo = [block[i] for i in batch]
            draws = np.stack(
                [uniforms(seed, p["id"], sample, max_tokens) for p, sample in todo]
            )
            how = dict(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
            if toolbox:
                answers = sample_episodes(
                    policy,
                    [rendered[p["id"]] for p, _ in todo],
                    draws,
                    toolbox,
                    [f"{seed}|{p['id']}|{sample}" for p, sample in todo],
                    **how,
                )
            else:
                sampled = sample_batch(
                    policy, [rendered[p["id"]] for p, _ in todo], draws, **how
                )
                answers = [
                    dict(zip(("response_ids", "logprobs", "finish_reason", "end_mass"), answer))
                    for answer in sampled
                ]
            yield [
                rollout_record(
                    prompt,
                    sample,
                    policy.identity,
                    answer
                    | {
                        "prompt_ids": rendered[prompt["id"]],
                        "text": policy.tokenizer.decode(
                            answer["response_ids"], skip_special_tokens=True
                        ),
                    },
                    temperature,
                    top_p,
                )
                for (prompt, sample), answer in zip(todo, answers)
            ]


def rollout_record(prompt, sample, identity, answer, temperature, top_p):
    """A rollouts record from what a sampler or a server gave (a black-box server gives no ids
    and no log-probs)."""
    record = {
        "id": prompt["id"],
        "sample": sample,
        "policy": identity,
        "text": answer["text"],
        "finish_reason": answer["finish_reason"],
        "temperature": temperature,
        "top_p": top_p,
    }
    if "response_ids" in answer:
        record |= {
            "prompt_ids": answer["prompt_ids"],
            "response_ids": answer["response_ids"],
            "loss_mask": [1] * len(answer["response_ids"]),
            "logprobs": records.floats(np.minimum(answer["logprobs"], 0)),
        }
    record |= {
        name: answer[name]
        for name in ("loss_mask", "steps", "calls", "final")
        if "steps" in answer
    }
    # how likely it was to end where its last token stands; a server does not say
    if answer.get("end_mass") is not None:
        record["end_mass"] = float(f"{answer['end_mass']:.6g}")
    return record


# ---- the stage


def add_sampling_flags(p, n):
    p.add_argument(
        "--model",
        required=True,
        help="folder, Hugging Face id, or the name a server knows the model by",
    )
    p.add_argument("--prompts", required=True, help="JSONL of prompts")
    p.add_argument("--n", type=int, default=n, help="answers a prompt")
    p.add_argument(
        "--out", required=True, help="JSONL to write; run again to complete an interrupted file"
    )
    p.add_argument(
        "--slice",
        default=":",
        metavar="A:B",
        help="only these prompts of the file, as in Python (0:32)",
    )
    p.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="only every N-th prompt starting at I: N machines, N files",
    )
    p.add_argument(
        "--max-tokens",
        type=int,
        default=512,
        help="longest answer, with --tools what they say counts, too; a cut one ends in "
        "finish_reason `length`",
    )
    p.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="1 is what the losses assume; 0 is greedy (evaluation)",
    )
    p.add_argument(
        "--top-p", type=float, default=1.0, help="nucleus mass; below 1 is for evaluation only"
    )
    p.add_argument(
        "--seed",
        type=int,
        default=0,
        help="with the prompt id and sample number, fixes every answer",
    )
    p.add_argument(
        "--batch-tokens",
        type=int,
        default=16384,
        help="rows x (prompt + max-tokens) held at once: memory against speed",
    )
    p.add_argument(
        "--tools",
        metavar="NAME,...",
        help="calculator, or MODULE:CLASS of your own: the model may call them and goes on "
        "with what they say (tools.py)",
    )
    p.add_argument(
        "--tool-options",
        type=json.loads,
        metavar="JSON",
        help="""keyword arguments of the first tool, e.g. '{"outage": 0.2}'""",
    )
    p.add_argument(
        "--call-format", choices=FORMATS, help="how the model writes a call (default: hermes)"
    )
    p.add_argument(
        "--max-calls",
        type=int,
        help="calls of an episode; one more ends it in finish_reason `tool_limit` (default: "
        "16)",
    )
    add_model_flags(p)
    p.add_argument("--overwrite", action="store_true", help="begin the output anew")
    served.add_flags(p)


def toolbox_of(args):
    """The Toolbox of --tools, or None; flags that belong to it go with it only."""
    own = {
        "--tool-options": args.tool_options,
        "--call-format": args.call_format,
        "--max-calls": args.max_calls,
    }
    if not args.tools:
        for flag, value in own.items():
            if value is not None:
                raise BadInput(f"{flag} {value}: goes with --tools")
        return None
    if args.base_url:
        raise BadInput(
            "--tools: run beside weights that are loaded here, expected no --base-url with it"
        )
    options = {} if args.tool_options is None else args.tool_options
    if not isinstance(options, dict):
        raise BadInput(f"--tool-options: expected a JSON object, came {options!r}")
    return Toolbox(
        args.tools,
        options,
        args.call_format or "hermes",
        16 if args.max_calls is None else args.max_calls,
    )


def add_model_flags(p):
    """How a model is loaded, or which folder speaks for a served one; shared with teacher.py
    score."""
    p.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: as the folder stores it",
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    p.add_argument(
        "--template-options",
        type=json.loads,
        default={},
        metavar="JSON",
        help="handed to the chat template, e.g. '{\"enable_thinking\": false}'",
    )
    p.add_argument(
        "--tokenizer",
        help="served models: folder whose template and vocabulary the server uses (default: "
        "--model if a folder)",
    )


def select_prompts(args):
    """The prompts of --prompts that --slice and --shard leave, in file order."""
    try:
        start, stop = (int(x) if x else None for x in args.slice.split(":"))
        shard, shards = map(int, args.shard.split("/"))
        assert 0 <= shard < shards
    except (ValueError, AssertionError):
        raise BadInput(
            f"--slice {args.slice} --shard {args.shard}: expected A:B and I/N with 0 <= I < N"
        ) from None
    prompts = list(records.read(args.prompts, "prompts"))[slice(start, stop)][shard::shards]
    if not prompts:
        raise BadInput(
            f"{args.prompts}: no prompt is left by --slice {args.slice} --shard {args.shard}"
        )
    return prompts


def served_policy(args):
    """(tokenizer, `policy` object) of a served model; (None, hashes that are null) when no
    folder is at hand.

    The folder is --tokenizer, or --model if that is a model folder.  That the server really
    runs these weights is the caller's word: train.py's rollout/logprob_gap_mean shows when it
    is not so."""
    name = args.tokenizer or (
        args.model if (Path(args.model) / "config.json").is_file() else None
    )
    if name is None:
        return None, {
            "model": args.model,
            "weights": None,
            "template": None,
            "vocabulary": None,
        }
    folder, tokenizer = find_folder(name), load_tokenizer(name)
    weights = hash_weights(folder) if list(folder.glob("*.safetensors")) else None
    return tokenizer, identity_of(args.model, weights, tokenizer, args.template_options)


def who(identity):
    """What must not change while a file is completed: the weights where they are known,
    whatever path they were loaded from."""
    return {k: v for k, v in identity.items() if k != "model" or identity["weights"] is None}


def answer_prompts(args, kind, need_tokens):
    """What rollout.py and `teacher.py answer` share: sample what is missing from --out.
    Returns the summary dict."""
    if args.n < 1 or args.max_tokens < 1 or args.temperature < 0 or not 0 < args.top_p <= 1:
        raise BadInput(
            "--n and --max-tokens must be at least 1, --temperature at least 0, --top-p in "
            "(0, 1]"
        )
    if not isinstance(args.template_options, dict):
        raise BadInput(
            f"--template-options: expected a JSON object, came {args.template_options!r}"
        )
    prompts, toolbox = select_prompts(args), toolbox_of(args)
    if args.base_url:
        policy, (tokenizer, identity) = None, served_policy(args)
        if need_tokens and tokenizer is None:
            raise BadInput(
                f"--model {args.model}: give its folder with --tokenizer: token ids without "
                f"a vocabulary and template cannot be trained on "
                "(texts alone: teacher.py answer)"
            )
    else:
        policy = load_policy(args.model, args.dtype, args.device, args.template_options)
        identity = policy.identity
    settings = {
        "policy": who(identity),
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
        "dtype": args.dtype,
        "served": bool(args.base_url),
    }
    if toolbox:
        settings["tools"] = [
            args.tools,
            args.tool_options or {},
            toolbox.form,
            toolbox.most_calls,
        ]
    total, failures = len(prompts) * args.n, []
    with records.Writer(args.out, kind, settings, [args.prompts], args.overwrite) as writer:
        jobs = [
            (p, s) for p in prompts for s in range(args.n) if (str(p["id"]), s) not in writer
        ]
        with records.progress(
            total=total, initial=total - len(jobs), desc=Path(args.out).name
        ) as bar:
            if policy:
                batches = generate(
                    policy,
                    jobs,
                    max_tokens=args.max_tokens,
                    temperature=args.temperature,
                    top_p=args.top_p,
                    seed=args.seed,
                    batch_tokens=args.batch_tokens,
                    toolbox=toolbox,
                )
            else:
                batches = generate_served(
                    args, jobs, identity, tokenizer if need_tokens else None
                )
            for batch in batches:
                if isinstance(batch, served.ServedFailure):
                    failures.append(batch)
                    served.stop_if_failing(failures, len(writer.done), total, args)
                    continue
                writer.write(*batch)
                bar.update(len(batch))
        written = len(writer.done)
    if failures:
        print(
            f"{args.out}: {len(failures)} of {total} answers failed at the server (first: "
            f"{failures[0]}); run the same command again for them"
        )
    return {"out": args.out, "records": written, "failed": len(failures)}


def generate_served(args, jobs, identity, tokenizer):
    """Like `generate`, from a server: yields lists of one record, or the ServedFailure of one
    that failed after all retries.

    tokenizer: for training; the server's prompt ids must then be those that its template gives
    here."""
    server = served.Server.from_flags(args)

    def ask(job):
        prompt, sample = job
        seed = (
            int.from_bytes(
                hashlib.sha256(f"{args.seed}|{prompt['id']}|{sample}".encode()).digest()[:4],
                "little",
            )
            >> 1
        )
        return server.sample(
            prompt.get("messages") or prompt["prompt"],
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=seed,
            need_tokens=tokenizer is not None,
            template_options=args.template_options,
        )

    for (prompt, sample), answer in server.map(ask, jobs):
        if isinstance(answer, served.ServedFailure):
            yield answer
            continue
        if tokenizer is not None and answer["prompt_ids"] != (
            expected := render(tokenizer, prompt, args.template_options)
        ):
            raise BadInput(
                f"prompt {prompt['id']!r}: the server was given {len(answer['prompt_ids'])} "
                f"tokens, but the template of {args.tokenizer or args.model} "
                f"renders {len(expected)} others: it serves another tokenizer or chat "
                f"template, or needs other --template-options"
            )
        yield [rollout_record(prompt, sample, identity, answer, args.temperature, args.top_p)]


def main(argv=None):
    p = records.parser(__doc__)
    add_sampling_flags(p, n=8)
    args = p.parse_args(argv)
    summary = answer_prompts(args, "rollouts", need_tokens=True)
    # of the whole file, also what an earlier run has written
    lengths, cut, calls, limited = [], 0, [], []
    for r in records.read(args.out, "rollouts"):
        lengths.append(records.written(r))
        cut += r["finish_reason"] == "length"
        limited.append(r["finish_reason"] == "tool_limit")
        calls.append([call["ok"] for call in r.get("calls", ())])
    summary |= {
        "generated_tokens": sum(lengths),
        "length_mean": float(np.mean(lengths)),
        "truncated": cut / len(lengths),
    }
    more = ""
    if args.tools:
        summary |= call_use(calls, limited)
        more = (
            f"; {summary['calls']:.2f} calls an episode, {summary['call_errors']:.1%} of "
            f"them failed, {summary['tool_limit']:.1%} of the episodes ended at the "
            f"last call"
        )
    print(
        f"rollout.py: {args.out}: {summary['records']} rollouts, mean length "
        f"{summary['length_mean']:.1f} tokens, "
        f"{summary['truncated']:.1%} cut at {args.max_tokens}{more}"
    )
    return summary


if __name__ == "__main__":
    records.run(main)
