"""GAD's own toy (arXiv 2511.10643, its ten classes): what a discriminator makes of a student
that cannot be its teacher.

    python -m experiments.gad_toy     # ten seeds, under a minute: a table and a picture

The teacher is a mixture of two bumps over ten classes.  The student is one bump, softmax of
-(class - mu)^2 / 2 sigma^2 with sigma below 1.5, so that it must choose: cover both bumps and
the valley between them, or sit on one.  All that anybody sees of the teacher is samples.  All
arms start from one place between the bumps, another in every seed, and take as many steps.

    seqkd        maximum likelihood of the teacher's samples: forward KL, which covers
    gad          a table of ten scores learns by Bradley-Terry to tell the teacher's samples
                 from the student's, and the student follows it by REINFORCE with the group's
                 mean as the baseline (the score's optimum is log p_T / p_S: reverse KL, which
                 chooses)
    shuffled     control: gad whose pairs are swapped by a coin: the scores have nothing to
                 learn, the student must stay where it was
    no-update    control: gad whose table is kept at zero

Simplification: classes for texts; everything else of GAD is in gad.py.
"""

import json
import sys
from pathlib import Path

import torch

from experiments.claims import markdown, plus_minus
from opd import cli, disk
from opd.pictures import new_picture, tidy

CLASSES = 10
MODES = ((0, 1, 2, 3), (6, 7, 8, 9))
VALLEY = (4, 5)
KINDS = ("start", "seqkd", "gad", "shuffled", "no-update")


def teacher_of(weights=(0.6, 0.4), means=(2.0, 7.0), width=0.7):
    """p_T over the classes: two discretised Gaussians, one a little heavier."""
    x = torch.arange(CLASSES, dtype=torch.float64)
    bumps = [torch.softmax(-((x - m) ** 2) / (2 * width**2), 0) for m in means]
    return sum(w * b for w, b in zip(weights, bumps))


def student_of(parameters):
    """p_S over the classes from (mu, s), sigma = 1.5 sigmoid(s)."""
    x = torch.arange(CLASSES, dtype=torch.float64)
    return torch.softmax(-((x - parameters[0]) ** 2) / (2 * sigma_of(parameters) ** 2), 0)


def sigma_of(parameters):
    return 1.5 * torch.sigmoid(parameters[1])


def measure(p, teacher):
    """{mode: most mass on one bump, valley: mass between them, forward, reverse: KLs}."""
    safe = p.clamp_min(1e-300)
    return {
        "mode": max(float(p[list(m)].sum()) for m in MODES),
        "valley": float(p[list(VALLEY)].sum()),
        "forward": float((teacher * (teacher / safe).log()).sum()),
        "reverse": float((p * (safe / teacher).log()).sum()),
    }


def train(kind, teacher, start, seed, steps, batch=256, rate=0.05, judge_rate=0.3):
    """(mu, s) after `steps` of seqkd, gad, shuffled or no-update from `start`."""
    rng = torch.Generator().manual_seed(seed)
    parameters = start.clone().requires_grad_()
    scores = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    # Adam would make full steps of noise
    student = torch.optim.SGD([parameters], lr=rate)
    judge = torch.optim.SGD([scores], lr=judge_rate)
    for step in range(steps):
        theirs = torch.multinomial(teacher, batch, True, generator=rng)
        if kind == "seqkd":
            loss = -student_of(parameters).log()[theirs].mean()
        else:
            p = student_of(parameters).detach()
            own = torch.multinomial(p, batch, True, generator=rng)
            reward = scores[own].detach()  # by the scores of before this batch
            if kind != "no-update":
                swap = torch.rand(batch, generator=rng) < (0.5 if kind == "shuffled" else 0.0)
                better = torch.where(swap, own, theirs)
                worse = torch.where(swap, theirs, own)
                judge.zero_grad()
                torch.nn.functional.softplus(scores[worse] - scores[better]).mean().backward()
                judge.step()
            if step < steps // 10:  # warm-up of the scores alone
                continue
            advantage = reward - reward.mean()
            loss = -(advantage * student_of(parameters).log()[own]).mean()
        student.zero_grad()
        loss.backward()
        student.step()
    return parameters.detach()


def start_of(seed):
    """(mu, s) between the bumps, sigma 0.75."""
    rng = torch.Generator().manual_seed(10**6 + seed)
    mu = 3 + 3 * torch.rand(1, dtype=torch.float64, generator=rng)
    return torch.cat([mu, torch.zeros(1, dtype=torch.float64)])


def row_of(kind, teacher, seed, steps):
    """One arm of one seed: what its student ends as."""
    end = start_of(seed)
    if kind != "start":
        end = train(kind, teacher, end, seed, steps)
    made = {"arm": kind, "seed": seed, "step": steps}
    made |= {"mu": float(end[0]), "sigma": float(sigma_of(end))}
    return made | measure(student_of(end), teacher), student_of(end)


def plot(teacher, shown, path):
    """shown: {arm: p_S}, each drawn over the teacher's bars."""
    figure = new_picture(3.2 * len(shown), 2.8)
    for axes, (name, p) in zip(figure.subplots(1, len(shown), sharey=True), shown.items()):
        axes.bar(range(CLASSES), teacher, color="0.8")
        axes.plot(range(CLASSES), p, "o-", color="C3")
        axes.set(title=name, xlabel="class", xticks=range(CLASSES))
        axes.set_ylabel("probability (grey: teacher)")
        axes.label_outer()
        tidy(axes)
    figure.savefig(path)


def table(teacher, rows):
    """Markdown: means over seeds ± half of the 95 % t-interval."""
    names = ("mode", "valley", "forward", "reverse")
    ideal = measure(teacher, teacher)
    lines = [["arm", "mass on one bump", "in the valley", "KL(p_T, p_S)", "KL(p_S, p_T)"]]
    lines.append(["the teacher", *(f"{ideal[name]:.3f}" for name in names)])
    for kind in KINDS:
        own = [row for row in rows if row["arm"] == kind]
        lines.append([kind, *(plus_minus([row[name] for row in own]) for name in names)])
    return markdown(lines)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    p = cli.parser(__doc__)
    p.add_argument("--out", default="runs/gad_toy", help="folder for table, numbers, picture")
    p.add_argument("--seeds", type=int, default=10, help="seeds 0..N-1: samples of both")
    p.add_argument("--steps", type=int, default=3000, help="steps of every phase")
    p.add_argument("--smoke", action="store_true", help="two seeds, few steps")
    args = p.parse_args(argv)
    if args.smoke:
        args.seeds, args.steps = 2, 20
    teacher, rows, shown = teacher_of(), [], {}
    for seed in range(args.seeds):
        for kind in KINDS:
            row, student = row_of(kind, teacher, seed, args.steps)
            rows.append(row)
            shown.setdefault(kind, student)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    command = f"python -m experiments.gad_toy {' '.join(argv)}".strip()
    found = {"command": command, "teacher": teacher.tolist(), "rows": rows}
    disk.write_atomically(out / "results.json", json.dumps(found, indent=1) + "\n")
    disk.write_atomically(out / "table.md", table(teacher, rows))
    plot(teacher, shown, out / "gad_toy.png")
    print(table(teacher, rows) + f"\npicture of seed 0: {out}/gad_toy.png")
    return {"out": str(out), "rows": rows}


if __name__ == "__main__":
    cli.run(main)
