"""Sampling answers, alone or in episodes with tools, here or from a server."""

import hashlib
import json

import numpy as np
import torch

from opd import files, records, served
from opd.kernel import all_logits
from opd.policy import (
    add_model_flags,
    load_policy,
    render,
    resume_identity,
    served_policy,
    token_batches,
)
from opd.records import BadInput
from opd.tools import FORMATS, Toolbox

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
        "with what they say (opd/tools.py)",
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
        raise BadInput(f"--tool-options: expected a JSON object, got {options!r}")
    return Toolbox(
        args.tools,
        options,
        args.call_format or "hermes",
        16 if args.max_calls is None else args.max_calls,
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
    prompts = list(files.read(args.prompts, "prompts"))[slice(start, stop)][shard::shards]
    if not prompts:
        raise BadInput(
            f"{args.prompts}: no prompt is left by --slice {args.slice} --shard {args.shard}"
        )
    return prompts


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
            f"--template-options: expected a JSON object, got {args.template_options!r}"
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
        "policy": resume_identity(identity),
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
    jobs = {(str(p["id"]), sample): (p, sample) for p in prompts for sample in range(args.n)}

    def work(missing):
        asked = [jobs[key] for key in missing]
        if policy is None:
            return generate_served(args, asked, identity, tokenizer if need_tokens else None)
        return generate(
            policy,
            asked,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            batch_tokens=args.batch_tokens,
            toolbox=toolbox,
        )

    written, failures = files.fill(
        args.out,
        kind,
        jobs,
        work,
        settings,
        [args.prompts],
        args.overwrite,
        limit=served.failure_limit(args),
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
