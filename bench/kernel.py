"""opd/kernel.py beside everything else that computes log-probs or a KL from hidden states and a
head: time, memory, accuracy.

    python -m bench.kernel --out results/kernel.jsonl                     # every shape, float32
    and bfloat16: about half an hour on 2 cores
    python -m bench.kernel --shapes 2048x576x49152 --dtypes float32
    python -m bench.kernel table results/kernel.jsonl results/train_step.jsonl      # all lines,
    then what was to be shown
    python -m bench.kernel plot results/kernel.jsonl --out results/kernel.png

Every contender does a forward and a backward pass, gradients of hidden states and head
included, with an upstream gradient of its own for every token.  One line of JSON each, with

    seconds           median of --repeats runs; the contenders take turns in one process, so a
                      slow minute slows all of them
    ratio             median over the turns of this contender's time / naive's in the same turn
    largest           elements of the largest tensor that any operation made, as a
                      TorchDispatchMode sees it
    rss_growth_mb     peak resident memory of a fresh process that runs it once, beyond that of
                      one that makes the operands and a
                      gradient of the head (Linux)
    error_logp        largest difference to float64 on the same operands, nats;  error_dhidden,
                      error_dweight: norm of the
                      difference / norm

`gemm` is the bound: the three matrix products and nothing else, into arrays made before.  TRL
and Liger are measured where they can be imported (`pip install trl`; Liger needs a GPU);
neither is needed otherwise."""

import argparse
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from opd.kernel import linear_logp, linear_reverse_kl, linear_token_loss

ROOT = Path(__file__).resolve().parents[1]
SHAPES = "2048x576x49152 512x1024x151936 4096x1024x32000"


def operands(shape, dtype, teacher=False, device="cpu"):
    """hidden [N, D], weight [V, D], ids [N], upstream [N]; logits with a spread of 2.4 (entropy
    near 8 nats of 10.8).  A teacher's hidden states are the student's with 5 % noise, its head
    is the student's."""
    n, d, v = shape
    r = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=r).to(device, dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=r) * 2.4 / d**0.5).to(device, dtype).requires_grad_()
    ids = torch.randint(0, v, (n,), generator=r).to(device)
    upstream = torch.randn(n, generator=r).to(device)
    if not teacher:
        return hidden, weight, ids, upstream
    noise = 0.05 * torch.randn(n, d, generator=r).to(device)
    near = (hidden.detach().float() + noise).to(dtype)
    return hidden, weight, near, weight.detach(), upstream


# ---- contenders: log-probs


def ours_slices(hidden, weight, ids, upstream):
    seen = []
    linear_token_loss(
        hidden,
        weight,
        ids[:, None],
        lambda cut, n: (
            seen.append(n.logp.detach()[:, 0]),
            (n.logp[:, 0] * upstream[cut]).sum(),
        )[1],
    ).backward()
    return torch.cat(seen)


def ours_recompute(hidden, weight, ids, upstream):
    logp, _ = linear_logp(hidden, weight, ids)
    (logp * upstream).sum().backward()
    return logp


def ours_triton(hidden, weight, ids, upstream):
    logp, _ = linear_logp(hidden, weight, ids, kernel="triton")
    (logp * upstream).sum().backward()
    return logp


def naive(hidden, weight, ids, upstream):
    logp = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, ids[:, None])[:, 0]
    (logp * upstream).sum().backward()
    return logp


def torch_linear_cross_entropy(hidden, weight, ids, upstream):
    logp = -F.linear_cross_entropy(hidden, weight, ids, reduction="none")
    (logp * upstream).sum().backward()
    return logp


def torch_linear_cross_entropy_chunked(hidden, weight, ids, upstream):
    logp = -F.linear_cross_entropy(
        hidden,
        weight,
        ids,
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256),
    )
    (logp * upstream).sum().backward()
    return logp


def trl_selective_log_softmax(hidden, weight, ids, upstream):
    from trl.trainer.utils import selective_log_softmax

    logp = selective_log_softmax(hidden @ weight.T, ids)
    (logp * upstream).sum().backward()
    return logp


def trl_chunked(hidden, weight, ids, upstream):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    logp = ChunkedLogProbFunction.apply(
        hidden,
        weight,
        None,
        ids,
        1.0,
        utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        None,
        1.0,
        ("entropy",),
    )[0]
    (logp * upstream).sum().backward()
    return logp


def liger(hidden, weight, ids, upstream):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    logp = -liger_fused_linear_cross_entropy(hidden, weight, ids, reduction="none")
    (logp * upstream).sum().backward()
    return logp


def quack(hidden, weight, ids, upstream):
    from quack.linear_cross_entropy import linear_cross_entropy

    logp = -linear_cross_entropy(hidden, weight, ids, reduction="none")
    (logp * upstream).sum().backward()
    return logp


def cut_cross_entropy(hidden, weight, ids, upstream):
    from cut_cross_entropy import linear_cross_entropy

    logp = -linear_cross_entropy(hidden, weight, ids, reduction="none")
    (logp * upstream).sum().backward()
    return logp


# ---- contenders: KL to a teacher


def ours_kl_slices(hidden, weight, t_hidden, t_weight, upstream):
    seen, ids = [], torch.zeros(len(hidden), 1, dtype=torch.int64, device=hidden.device)
    linear_token_loss(
        hidden,
        weight,
        ids,
        lambda cut, n: (
            seen.append(n.reverse_kl.detach()),
            (n.reverse_kl * upstream[cut]).sum(),
        )[1],
        teacher=(t_hidden, t_weight, {}),
    ).backward()
    return torch.cat(seen)


def ours_kl_recompute(hidden, weight, t_hidden, t_weight, upstream):
    kl = linear_reverse_kl(hidden, weight, t_hidden, t_weight)
    (kl * upstream).sum().backward()
    return kl


def naive_kl(hidden, weight, t_hidden, t_weight, upstream):
    p = torch.log_softmax((hidden @ weight.T).float(), -1)
    q = torch.log_softmax((t_hidden @ t_weight.T).float(), -1)
    kl = (p.exp() * (p - q)).sum(-1)
    (kl * upstream).sum().backward()
    return kl


def trl_chunked_divergence(hidden, weight, t_hidden, t_weight, upstream):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    kl, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, t_hidden, t_weight, None, 1.0, 1.0
    )
    (kl * upstream).sum().backward()
    return kl


LOGP = dict(
    naive=naive,
    ours_slices=ours_slices,
    ours_recompute=ours_recompute,
    ours_triton=ours_triton,
    torch_linear_cross_entropy=torch_linear_cross_entropy,
    torch_linear_cross_entropy_chunked=torch_linear_cross_entropy_chunked,
    trl_selective_log_softmax=trl_selective_log_softmax,
    trl_chunked=trl_chunked,
    liger=liger,
    quack=quack,
    cut_cross_entropy=cut_cross_entropy,
)
KL = dict(
    naive=naive_kl,
    ours_slices=ours_kl_slices,
    ours_recompute=ours_kl_recompute,
    trl_chunked=trl_chunked_divergence,
)


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


GPU_ONLY = {
    "ours_triton": "triton",
    "liger": "liger-kernel",
    "quack": "quack-kernels",
    "cut_cross_entropy": "cut-cross-entropy",
}


def available(name, device):
    """Whether a contender can run here: its package is there, and a GPU if it needs one."""
    if name.startswith("trl"):
        return version("trl") is not None
    if name in GPU_ONLY:
        return device != "cpu" and version(GPU_ONLY[name]) is not None
    return True


# ---- measuring


def synchronise(x):
    """Waits until x's device has done what it was asked."""
    if x.is_cuda:
        torch.cuda.synchronize()


def once(f, args):
    """(seconds, result) of one forward and backward pass."""
    for x in args[:2]:
        x.grad = None
    synchronise(args[0])
    start = time.perf_counter()
    out = f(*args)
    synchronise(args[0])
    return time.perf_counter() - start, out.detach()


def gemm(hidden, weight):
    """A function that runs the three products of shape N x D x V into arrays made before, and
    returns its seconds."""
    hidden, weight = hidden.detach(), weight.detach()
    z = hidden @ weight.T
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weight)

    def run():
        synchronise(hidden)
        start = time.perf_counter()
        torch.mm(hidden, weight.T, out=z)
        torch.mm(z, weight, out=d_hidden)
        torch.mm(z.T, hidden, out=d_weight)
        synchronise(hidden)
        return time.perf_counter() - start

    return run


def largest(f, args):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            seen[0] = max(
                seen[0],
                *(
                    x.numel()
                    for x in (out if isinstance(out, (tuple, list)) else (out,))
                    if isinstance(x, torch.Tensor)
                ),
                0,
            )
            return out

    with Largest():
        once(f, args)
    return seen[0]


def exact(kind, args, rows=256):
    """(value [N], dhidden, dweight) in float64 from the very same operands, a few tokens at a
    time."""
    if kind == "logp":
        hidden, weight, ids, upstream = args
    else:
        hidden, weight, t_hidden, t_weight, upstream = args
        t_weight = t_weight.double()
    w = weight.detach().double()
    values, d_hidden, d_weight = [], [], torch.zeros_like(w)
    for start in range(0, len(hidden), rows):
        cut = slice(start, start + rows)
        h, u = hidden.detach()[cut].double(), upstream[cut].double()[:, None]
        logp = torch.log_softmax(h @ w.T, -1)
        if kind == "logp":
            values.append(logp.gather(1, ids[cut, None])[:, 0])
            dz = logp.exp_().mul_(-u).scatter_add_(1, ids[cut, None], u)
        else:
            delta = logp - torch.log_softmax(t_hidden[cut].double() @ t_weight.T, -1)
            p = logp.exp_()
            kl = (p * delta).sum(-1, keepdim=True)
            values.append(kl[:, 0])
            dz = p.mul_(delta.sub_(kl)).mul_(u)
        d_hidden.append(dz @ w)
        d_weight.addmm_(dz.T, h)
    return torch.cat(values), torch.cat(d_hidden), d_weight


def peak_rss(*command):
    """Peak resident megabytes of this file run as `child`."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernel", "child", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def child(kind, name, shape, dtype):
    args = operands(tuple(map(int, shape.split("x"))), getattr(torch, dtype), kind == "kl")
    if name == "nothing":
        # the gradient of the head, which every contender has to make
        args[1].grad = torch.ones_like(args[1])
    else:
        once((LOGP if kind == "logp" else KL)[name], args)
    # getrusage would count what the parent held when this process was forked
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def measure(kind, shape, dtype, args):
    contenders = {
        name: f
        for name, f in (LOGP if kind == "logp" else KL).items()
        if available(name, args.device)
    }
    data = operands(shape, getattr(torch, dtype), kind == "kl", args.device)
    bound = gemm(*data[:2])
    bounds = []
    times = {name: [] for name in contenders}
    for turn in range(args.repeats + 1):  # the first turn warms up and is not counted
        bounds.append(bound())
        for name, f in contenders.items():
            times[name].append(once(f, data)[0])
    bounds = bounds[1:]
    times = {name: t[1:] for name, t in times.items()}
    want = exact(kind, data)
    text = "x".join(map(str, shape))
    base = peak_rss(kind, "nothing", text, dtype)
    common = {
        "kind": kind,
        "shape": text,
        "dtype": dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }
    yield common | {
        "contender": "gemm",
        "seconds": statistics.median(bounds),
        "ratio": statistics.median(b / n for b, n in zip(bounds, times["naive"])),
    }
    for name, f in contenders.items():
        value = once(f, data)[1]
        row = {
            "contender": name,
            "seconds": statistics.median(times[name]),
            "ratio": statistics.median(a / b for a, b in zip(times[name], times["naive"])),
            "over_gemm": statistics.median(a / b for a, b in zip(times[name], bounds)),
            "value_dtype": str(value.dtype).removeprefix("torch."),
            "error_logp" if kind == "logp" else "error_kl": float(
                (value.double() - want[0]).abs().max()
            ),
        }
        for field, x, y in (
            ("error_dhidden", data[0], want[1]),
            ("error_dweight", data[1], want[2]),
        ):
            row[field] = float((x.grad.double() - y).norm() / y.norm())
        row["largest"] = largest(f, data)
        row["rss_growth_mb"] = (
            round(peak_rss(kind, name, text, dtype) - base, 1) if args.device == "cpu" else None
        )
        yield common | row


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--shapes",
        nargs="+",
        default=SHAPES.split(),
        metavar="NxDxV",
        help="tokens x hidden x vocabulary",
    )
    p.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    p.add_argument(
        "--kinds",
        nargs="+",
        default=["logp", "kl"],
        choices=["logp", "kl"],
        help="log-probs of one token, or the KL to a teacher",
    )
    p.add_argument("--repeats", type=int, default=5, help="counted turns")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", help="also append the lines here")
    args = p.parse_args()
    versions = {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "triton", "trl", "liger-kernel")
    }
    for shape in args.shapes:
        for dtype in args.dtypes:
            for kind in args.kinds:
                for row in measure(kind, tuple(map(int, shape.split("x"))), dtype, args):
                    line = json.dumps(row | {"versions": versions})
                    print(line, flush=True)
                    if args.out:
                        with open(args.out, "a") as f:
                            f.write(line + "\n")


COLUMNS = {  # field -> how its number is written
    "ratio": ".2f",
    "over_gemm": ".2f",
    "largest": ".1f",  # millions
    "rss_growth_mb": ".0f",
    "error": ".1e",
    "error_dhidden": ".1e",
    "error_dweight": ".1e",
}


def table(path):
    """The lines as Markdown."""
    print(
        "| shape, dtype | what | contender | time / naive | time / three GEMMs | largest "
        "tensor, M | RSS growth, MB | error of value | of dhidden | of dhead |\n"
        + "| --- " * 10
        + "|"
    )
    for row in map(json.loads, Path(path).read_text().splitlines()):
        cells = [f"{row['shape']}, {row['dtype']}", row["kind"], row["contender"]]
        row["error"] = row.get("error_logp", row.get("error_kl"))
        if "largest" in row:
            row["largest"] /= 1e6
        values = [(row.get(field), form) for field, form in COLUMNS.items()]
        cells += ["-" if value is None else format(value, form) for value, form in values]
        print("| " + " | ".join(cells) + " |")


def claims(path, step_path=None):
    """What the lines say of each thing the kernel was built for, as Markdown."""
    found = {}  # (kind, shape, dtype) -> {contender: its line}
    for row in map(json.loads, Path(path).read_text().splitlines()):
        found.setdefault((row["kind"], row["shape"], row["dtype"]), {})[row["contender"]] = row
    said = []
    for shape in dict.fromkeys(shape for _, shape, _ in found):
        said += float32_claims(shape, found.get(("logp", shape, "float32"), {}))
        said += bfloat16_claims(shape, found.get(("logp", shape, "bfloat16"), {}))
        said += largest_claim(shape, [rows for key, rows in found.items() if key[1] == shape])
    for (kind, shape, dtype), rows in found.items():
        if kind == "kl":
            said.append(kl_claim(shape, dtype, rows))
    if step_path:
        said.append(step_claim(step_path))
    print("\n| claim | measured | |\n| --- | --- | --- |")
    for claim, measured, holds in said:
        print(f"| {claim} | {measured} | {'holds' if holds else '**does not hold**'} |")


OURS = ("ours_slices", "ours_recompute")
TRL = ("trl_selective_log_softmax", "trl_chunked")
TORCH = "torch_linear_cross_entropy"


def column(rows, names, field):
    """The field of those contenders that were measured."""
    return [rows[name][field] for name in names if name in rows]


def float32_claims(shape, rows):
    """[(claim, what was measured, whether it holds)] of time and memory."""
    if not rows:
        return []
    slices, recompute = column(rows, OURS, "ratio")
    theirs = column(rows, TRL, "ratio")
    torch_ratio = rows[TORCH]["ratio"]
    growth = column(rows, OURS, "rss_growth_mb")
    naive = rows["naive"]["rss_growth_mb"]
    found = [
        (
            f"{shape} float32: slices at most 1.10 of naive's time, recomputing at most 1.40",
            f"{slices:.2f}, {recompute:.2f}",
            slices <= 1.1 and recompute <= 1.4,
        )
    ]
    if "trl_chunked" in rows:
        measured = "TRL " + ", ".join(f"{x:.2f}" for x in theirs)
        holds = max(slices, recompute) < min(theirs)
        found.append((f"{shape} float32: both faster than TRL's two paths", measured, holds))
    return found + [
        (
            f"{shape} float32: slices faster than `F.linear_cross_entropy`",
            f"{torch_ratio:.2f}",
            slices < torch_ratio,
        ),
        (
            f"{shape} float32: memory growth at most 1/8 of naive's",
            f"{growth[0]:.0f} and {growth[1]:.0f} MB of {naive:.0f}",
            max(growth) <= naive / 8,
        ),
    ]


def bfloat16_claims(shape, rows):
    """The same of accuracy, and of time."""
    if not rows:
        return []
    peers = (TORCH, *TRL, "naive")
    ours, others = column(rows, OURS, "error_logp"), column(rows, peers, "error_logp")
    ratios = column(rows, OURS, "ratio")
    gradient, further = gradient_errors(rows, OURS), gradient_errors(rows, peers)
    worst = max(gradient)
    return [
        (
            f"{shape} bfloat16: log-probs within 1e-4 nats",
            f"{max(ours):.0e}; others {min(others):.0e} to {max(others):.0e}",
            max(ours) <= 1e-4,
        ),
        (
            f"{shape} bfloat16: gradients within 0.5 %",
            f"{100 * worst:.2f} %; others {100 * min(further):.2f} to "
            f"{100 * max(further):.2f} %",
            worst <= 0.005,
        ),
        (
            f"{shape} bfloat16: ...where the others are ten times further off",
            f"{min(further) / worst:.1f} to {max(further) / min(gradient):.1f} times as far",
            min(further) >= 10 * worst,
        ),
        (
            f"{shape} bfloat16: at most 2.2 of naive's time (no CPU product keeps float32 "
            f"sums)",
            ", ".join(f"{x:.2f}" for x in ratios),
            max(ratios) <= 2.2,
        ),
    ]


def gradient_errors(rows, names):
    """The larger error of the two gradients, of those contenders that were measured."""
    pairs = zip(column(rows, names, "error_dhidden"), column(rows, names, "error_dweight"))
    return [max(pair) for pair in pairs]


def largest_claim(shape, kinds):
    """The same of the largest tensor; kinds: the contenders' lines, kind by kind."""
    largest = [x for rows in kinds for x in column(rows, OURS, "largest")]
    if not largest:
        return []
    _, d, v = map(int, shape.split("x"))
    return [
        (
            f"{shape}: the largest tensor is the head, or a slice of 64 MB of logits "
            f"(256 rows at least)",
            f"{max(largest) / 1e6:.1f} M",
            max(largest) <= max(v * d, 16 << 20, 256 * v),
        )
    ]


def kl_claim(shape, dtype, rows):
    names = [name for name in (*OURS, "naive", "trl_chunked") if name in rows]
    errors = gradient_errors(rows, names)
    return (
        f"{shape} {dtype}: gradient of the KL to a close teacher within 0.5 %",
        "; ".join(f"{name} {100 * x:.2g} %" for name, x in zip(names, errors)),
        max(gradient_errors(rows, OURS)) <= 0.005,
    )


def step_claim(path):
    """The same of a training step: lines of bench.train_step."""
    plain = {"dtype": "float32", "gradient_checkpointing": 0, "round": 1}
    step = {
        row["kernel"]: row
        for row in map(json.loads, Path(path).read_text().splitlines())
        if all(row.get(name, value) == value for name, value in plain.items())
    }
    ours, naive = step["torch" if "torch" in step else "auto"], step["naive"]
    saved = naive["peak_mb"] - ours["peak_mb"]
    return (
        "one train.py step of SmolLM2-135M, 4096 loss tokens in micro-batches of 2048: "
        "0.8 GB less at no less speed",
        f"{ours['peak_mb']:.0f} of {naive['peak_mb']:.0f} MB, {ours['step_seconds']:.1f} of "
        f"{naive['step_seconds']:.1f} s",
        saved >= 800 and ours["step_seconds"] <= naive["step_seconds"],
    )


def plot(argv):
    """Time against naive's, memory, and accuracy, a row of panels a shape."""
    p = argparse.ArgumentParser()
    p.add_argument("results")
    p.add_argument("--out", required=True)
    args = p.parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [
        r
        for r in map(json.loads, Path(args.results).read_text().splitlines())
        if r["kind"] == "logp"
    ]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    names = list(dict.fromkeys(r["contender"] for r in rows))
    figure, axes = plt.subplots(len(shapes), 3, figsize=(15, 3.2 * len(shapes)), squeeze=False)
    for line, shape in zip(axes, shapes):
        for offset, dtype in ((-0.2, "float32"), (0.2, "bfloat16")):
            some = {
                r["contender"]: r for r in rows if r["shape"] == shape and r["dtype"] == dtype
            }
            for axis, field in zip(line, ("ratio", "rss_growth_mb", "error_logp")):
                points = [
                    (names.index(n) + offset, r[field])
                    for n, r in some.items()
                    if r.get(field) is not None
                ]
                axis.barh(*zip(*points), height=0.38, label=dtype)
        for axis, title in zip(
            line,
            (
                "time / naive of the same dtype",
                "peak memory beyond operands and dhead, MB",
                "largest error of a log-prob, nats",
            ),
        ):
            axis.set_title(f"{shape}: {title}", fontsize=9)
            axis.set_yticks(
                range(len(names)), names if axis is line[0] else [""] * len(names), fontsize=8
            )
            axis.set_ylim(len(names) - 0.5, -0.5)
        line[0].axvline(1, color="black", linewidth=0.7)
        line[2].set_xscale("log")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    elif sys.argv[1:2] == ["table"]:
        table(sys.argv[2])
        claims(*sys.argv[2:])
    elif sys.argv[1:2] == ["plot"]:
        plot(sys.argv[2:])
    else:
        main()
