"""Every check that needs a GPU, as one command of under 8 minutes without network.

    python -m bench.gpu --out results/gpu.jsonl         # on a GPU: JSON lines, then a table
    python -m bench.gpu --smoke                         # tiny shapes, on the CPU as well

Sections, in order (--sections NAME ... picks some); one that fails is recorded with its error,
the others still run, and the exit code is 1:

    triton    the Triton kernels against the torch kernel on ragged shapes: log-probs, entropy,
              gradients of hidden states and head, with temperature, scale and softcap
    kernel    forward and backward in bfloat16 of each contender that can be imported (naive,
              ours, torch, TRL, Liger, QuACK, cut-cross-entropy): milliseconds, GiB beyond the
              operands and the head's gradient, ratio to this card's three matrix products, and
              the error against float64 on the same operands
    step      one train.py update on the device and on the CPU: largest difference of a weight
    round     rollout.py and train.py --method opd-full in bfloat16 at a real size: seconds of
              each, tokens a second, peak GiB, and the trainer's log-probs of the sampled tokens
              beside the sampler's. --model names the folder; one that holds config and
              tokenizer but no weights gets random ones (a 0.5B shape is enough to time)
    main_job  python -m experiments.ropd on the device: its accuracies
"""

import contextlib
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

import rollout
import train
from bench import kernel as bench_kernel
from opd import cli
from opd.kernel import linear_logp
from opd.policy import load_config, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((8192, 2048, 151936), (16384, 4096, 128256))  # tokens, width, vocabulary
SMOKE_SHAPES = ((64, 16, 512),)
REPEATS = 5
GIB = 1 << 30


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work, device, repeats=REPEATS):
    """Median seconds of `work()`, after one call that warms up."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# ---- triton: our two kernels on the GPU against each other


def relative_error(value, wanted):
    """Norm of the difference / norm of what was wanted."""
    return float((value.float() - wanted.float()).norm() / wanted.float().norm())


def triton_results(device, options, kernel, dtype):
    """(log-probs, entropy, gradient of hidden, gradient of head) of one ragged problem."""
    random = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(333, 192, generator=random).to(device, dtype).requires_grad_()
    weight = torch.randn(5003, 192, generator=random).to(device, dtype).requires_grad_()
    ids = torch.randint(0, 5000, (333, 3), generator=random).to(device)
    logp, entropy = linear_logp(hidden, weight, ids, vocabulary=5000, kernel=kernel, **options)
    loss = (logp * logp).sum() + entropy.sum()
    return logp.detach(), entropy.detach(), *torch.autograd.grad(loss, (hidden, weight))


def check_triton(device, args):
    """A line for each dtype and option: the largest relative error of Triton against torch."""
    if device != "cuda":
        yield {"skipped": "Triton kernels need a GPU; tests/test_kernel.py interprets them"}
        return
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"temperature": 0.7}, {"scale": 0.25, "softcap": 30.0}):
            wanted = triton_results(device, options, "torch", dtype)
            values = triton_results(device, options, "triton", dtype)
            errors = [relative_error(value, want) for value, want in zip(values, wanted)]
            bound = 0.01 if dtype == torch.bfloat16 else 1e-4
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "options": options,
                "errors": dict(zip(("logp", "entropy", "dhidden", "dweight"), errors)),
                "ok": max(errors) < bound,
            }


# ---- kernel: time, memory and error beside the peers


def peak_gib(work, device):
    """Peak memory of `work()` beyond what is held before it, GiB; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def three_products(hidden, weight):
    """The three matrix products that no contender can go below, into arrays made before."""
    hidden = hidden.detach()
    weight = weight.detach()
    z = hidden @ weight.T
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weight)

    def work():
        torch.mm(hidden, weight.T, out=z)
        torch.mm(z, weight, out=d_hidden)
        torch.mm(z.T, hidden, out=d_weight)

    return work


def measure_contender(contender, data, wanted, gemm_seconds, device):
    """One line: milliseconds, memory and errors of a contender's forward and backward pass."""
    hidden, weight = data[:2]

    def work():
        hidden.grad = None
        weight.grad = None
        return contender(*data).detach()

    seconds = seconds_of(work, device)
    gib = peak_gib(work, device)
    value = work()
    return {
        "milliseconds": round(seconds * 1000, 3),
        "over_gemm": round(seconds / gemm_seconds, 3),
        "gib": gib,
        "error_logp": float((value.double() - wanted[0]).abs().max()),
        "error_dhidden": float((hidden.grad.double() - wanted[1]).norm() / wanted[1].norm()),
        "error_dweight": float((weight.grad.double() - wanted[2]).norm() / wanted[2].norm()),
    }


def check_kernel(device, args):
    """Lines for every shape, first the bare products, then each contender of the log-probs."""
    for shape in SMOKE_SHAPES if args.smoke else SHAPES:
        data = bench_kernel.operands(shape, torch.bfloat16, device=device)
        work = three_products(*data[:2])
        gemm_seconds = seconds_of(work, device)
        del work
        common = {"shape": "x".join(map(str, shape)), "dtype": "bfloat16"}
        yield common | {"contender": "gemm", "milliseconds": round(gemm_seconds * 1000, 3)}
        wanted = bench_kernel.exact("logp", data)
        for name, contender in bench_kernel.LOGP.items():
            if not bench_kernel.available(name, device):
                yield common | {"contender": name, "skipped": "not installed, or needs a GPU"}
                continue
            try:
                row = measure_contender(contender, data, wanted, gemm_seconds, device)
            except Exception as error:  # a peer may not fit this card, or this torch
                row = {"error": f"{type(error).__name__}: {error}"[:300]}
                if name.startswith("ours"):
                    row["ok"] = False
            yield common | {"contender": name} | row
        del data, wanted
        if device == "cuda":
            torch.cuda.empty_cache()


# ---- step, round and main_job: the stages themselves


def run_module(*words):
    """Runs `python WORDS` in the repository; raises RuntimeError with its last words."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr[-500:]}")
    return done.stdout


def check_step(device, args):
    """The same supervised update on the device and on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        run_module("-m", "worlds.sums", "--out", world, "--clean", 64, "--mixed", 64)
        weights = {}
        seconds = {}
        for place in ("cpu", device):
            out = Path(folder) / f"on-{place}-{len(weights)}"
            start = time.perf_counter()
            # fmt: off
            run_module(
                "train.py", "--method", "sft", "--model", world / "student", "--rollouts",
                world / "clean.jsonl", "--batch-size", 64, "--steps", 1, "--learning-rate",
                1e-3, "--device", place, "--out", out,
            )
            # fmt: on
            seconds[place] = round(time.perf_counter() - start, 2)
            weights[out] = load_file(out / "model.safetensors")
        on_cpu, on_device = weights.values()
        gaps = [float((on_cpu[n] - on_device[n]).abs().max()) for n in on_cpu]
        # Adam's first step is +-lr whatever the gradient's size, so a gradient near 0 may flip
        agree = [
            float(((on_cpu[n] - on_device[n]).abs() < 1e-4).float().mean()) for n in on_cpu
        ]
        yield {
            "largest_gap": max(gaps),
            "smallest_share_within_1e-4": min(agree),
            "process_seconds": seconds,
            "ok": max(gaps) <= 2.1e-3 and min(agree) > 0.98,
        }


def model_folder(args, folder, device):
    """--model if it holds weights; else its shape and tokenizer with random weights."""
    if args.model and (args.model / "model.safetensors").exists():
        return args.model
    if args.model:
        config = load_config(args.model, args.model)
        tokenizer = load_tokenizer(args.model)
        torch.manual_seed(0)
        with torch.device(device):  # initialising on a CPU takes longer than the round
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return folder / "model"
    run_module("-m", "worlds.sums", "--out", folder, "--clean", 4, "--mixed", 4)
    return folder / "student"


def clocked(device, stage, words):
    """(seconds, peak GiB or None) of a stage's main in this process, its progress unheard."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        stage.main([str(word) for word in words])
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
    return round(seconds, 2), peak


def check_round(device, args):
    """Two rounds of 32 prompts x 8 answers of at most 256 tokens under exact reverse KL to the
    model itself; the first warms up, the second is the one to quote."""
    prompts, n, length = (4, 2, 8) if args.smoke else (32, 8, 256)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = model_folder(args, folder, device)
        with open(folder / "prompts.jsonl", "w", encoding="utf-8") as f:
            for i in range(prompts):
                row = {"id": f"p{i}", "messages": [{"role": "user", "content": f"{i}+{i}="}]}
                f.write(json.dumps(row) + "\n")
        common = {"model": args.model.name if args.model else "toy"}
        common["random_weights"] = model != args.model
        for turn in range(2):
            rollouts, out = folder / f"rollouts{turn}.jsonl", folder / f"out{turn}"
            # fmt: off
            seconds, peak = clocked(device, rollout, [
                "--model", model, "--prompts", folder / "prompts.jsonl", "--n", n,
                "--max-tokens", length, "--batch-tokens", 1 << 18, "--seed", turn,
                "--dtype", "bfloat16", "--device", device, "--out", rollouts,
            ])
            # fmt: on
            tokens = sum(len(json.loads(line)["response_ids"]) for line in open(rollouts))
            row = common | {"stage": "rollout", "turn": turn, "tokens": tokens}
            row |= {"seconds": seconds, "tokens_a_second": round(tokens / seconds)}
            yield row | {"peak_gib": peak}
            # fmt: off
            seconds, peak = clocked(device, train, [
                "--method", "opd-full", "--model", model, "--teacher", model,
                "--teacher-dtype", "bfloat16", "--dtype", "bfloat16", "--rollouts", rollouts,
                "--batch-size", prompts, "--micro-batch-tokens", 1 << 14,
                "--device", device, "--out", out,
            ])
            # fmt: on
            metrics = [json.loads(line) for line in open(out / "metrics.jsonl")][-1]
            row |= {"stage": "train", "seconds": seconds, "peak_gib": peak}
            row["tokens_a_second"] = round(tokens / seconds)
            row |= {f"gap_{k}": metrics[f"rollout/logprob_gap_{k}"] for k in ("mean", "max")}
            yield row | {"ok": row["gap_mean"] < 0.02}


def check_main_job(device, args):
    """experiments.ropd as a person runs it; it takes the GPU that it finds."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run_module(
            "-m", "experiments.ropd", "--out", folder, *(["--smoke"] if args.smoke else [])
        )
        rows = [json.loads(line) for line in open(Path(folder) / "results.jsonl")]
        final = {row["arm"]: row["accuracy"] for row in rows if row["final"]}
        line = {"accuracy": final, "seconds": round(time.perf_counter() - start, 1)}
        if not args.smoke:
            line["ok"] = final["ropd"] > final["before"] + 0.2 > final["shuffled"]
        yield line


SECTIONS = {
    "triton": check_triton,
    "kernel": check_kernel,
    "step": check_step,
    "round": check_round,
    "main_job": check_main_job,
}


def table(rows):
    """The lines of the section `kernel` as markdown, the others one a line."""
    lines = []
    for row in rows:
        if row["section"] != "kernel":
            shown = {k: v for k, v in row.items() if k not in ("section", "versions", "device")}
            lines.append(f"{row['section']}: {json.dumps(shown)}")
    lines.append(
        "\n| shape | contender | ms | / three GEMMs | GiB | error log-prob | dhidden |"
    )
    lines.append("|" + " --- |" * 7)
    for row in rows:
        if row["section"] != "kernel" or "milliseconds" not in row:
            continue
        cells = [row["shape"], row["contender"], f"{row['milliseconds']:.2f}"]
        for field, form in (
            ("over_gemm", ".2f"),
            ("gib", ".2f"),
            ("error_logp", ".1e"),
            ("error_dhidden", ".1e"),
        ):
            value = row.get(field)
            cells.append("-" if value is None else format(value, form))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None):
    p = cli.parser(__doc__)
    p.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    p.add_argument("--smoke", action="store_true", help="tiny shapes; runs on a CPU as well")
    p.add_argument("--model", type=Path, help="section round: model folder (default: a toy)")
    p.add_argument("--out", help="also append the lines here")
    args = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        p.error("no GPU here: --smoke runs the parts that a CPU can run")
    card = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "trl", "liger-kernel"):
        versions[package] = bench_kernel.version(package)
    rows = []
    for section in args.sections:
        start = time.perf_counter()
        lines = SECTIONS[section](device, args)
        try:
            for line in lines:
                rows.append(
                    {"section": section, "device": card} | line | {"versions": versions}
                )
                print(json.dumps(rows[-1]), flush=True)
        except (Exception, SystemExit) as error:  # the other sections still run
            text = f"{type(error).__name__}: {error}"[:500]
            rows.append({"section": section, "device": card, "error": text, "ok": False})
            print(json.dumps(rows[-1]), flush=True)
        print(f"{section}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if args.out:
        with open(args.out, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))
    return int(any(row.get("ok") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
