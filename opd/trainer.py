"""What every training run shares: AdamW, its schedule, and a folder that a killed run
continues from, ending in the same bits.

    trainer = Trainer(policy, settings)         masters (opd/masters.py), optimiser
    with Run(out, identity, ...) as run:        refuses a folder that holds something else
        run.begin(trainer, fresh)               or goes on from its last checkpoint
        for index, step in run.steps(count):    backward passes, whose gradients add up
            trainer.update()
            run.log(metrics)
        run.finish(summary)                     OUT.partial becomes OUT

OUT is a complete model folder.  Its subfolder trainer/ has moments and master weights as
safetensors and the rest as JSON: a subfolder, because loaders take every *.safetensors beside
config.json for weights of the model.  OUT.partial/LATEST names the last checkpoint; the one
before is kept, too.  A folder is on the disk, with the sizes and hashes of its files in
trainer/files.json, before LATEST or its last name point at it: after a power cut it is whole,
or known to be damaged."""

import contextlib
import itertools
import json
import math
import os
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opd import cli, disk, files
from opd.masters import masters_of
from opd.metrics import collapsed
from opd.policy import NO_CODE, hash_config
from opd.records import BadInput, show


@dataclass(frozen=True)
class TrainerSettings:
    """AdamW, its schedule, and how often a run is saved.  All but the rate and `save_every` are
    set by --optimizer NAME=VALUE."""

    learning_rate: float  # the peak of the schedule
    weight_decay: float = 0.01
    adam_beta2: float = 0.999  # memory of the second moment; 0.95 forgets faster
    grad_clip: float = 1.0  # largest gradient norm; 0 is off
    schedule: str = "constant"  # or "linear" or "cosine": decay to 0 at total_steps
    warmup_steps: int = 0  # of linear warm-up, counted over all rounds
    total_steps: int = 0  # end of the decay over all rounds; 0: this call's last step
    save_every: int = 100
    lora_rank: int = 0  # of the change of each weight matrix; 0: whole matrices are trained

    def check(self):
        """Raises BadInput for a value that makes no sense."""
        if self.schedule not in ("constant", "linear", "cosine"):
            raise BadInput(
                f"--optimizer schedule: expected constant, linear or cosine, got "
                f"{self.schedule!r}"
            )
        for name, value in vars(self).items():
            if name != "schedule" and not (math.isfinite(value) and value >= 0):
                raise BadInput(f"{name}: expected a finite number, at least 0, got {value}")
        if self.adam_beta2 >= 1:
            raise BadInput(f"adam_beta2: expected below 1, got {self.adam_beta2}")
        if self.save_every < 1:
            raise BadInput(f"--save-every: expected at least 1, got {self.save_every}")
        if self.total_steps and self.schedule == "constant":
            raise BadInput("total_steps: the end of a decay; a constant schedule has none")


def add_trainer_flags(p):
    """The flags of TrainerSettings, and what every training command has beside them."""
    p.add_argument(
        "--learning-rate",
        type=float,
        default=1e-6,
        help="peak of AdamW's learning rate; tiny models want 1e-3",
    )
    p.add_argument(
        "--optimizer",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="weight_decay (0.01), adam_beta2 (0.999), grad_clip (1.0; 0 is off), schedule "
        "(constant, linear or cosine), warmup_steps (0), total_steps (where the decay ends, "
        "counted over all rounds; by default this call's last step, so that each round decays "
        "to 0), lora_rank (0; 8: LoRA, a change of "
        "rank 8 of every torch.nn.Linear but the head is trained and nothing else)",
    )
    p.add_argument(
        "--micro-batch-tokens",
        type=int,
        default=8192,
        help="rows x longest row in one forward pass: memory, not result",
    )
    p.add_argument(
        "--save-every",
        type=int,
        default=100,
        help="steps between checkpoints a killed run continues from",
    )
    p.add_argument(
        "--fresh-optimizer",
        action="store_true",
        help="do not continue the optimiser state of --model",
    )
    p.add_argument("--overwrite", action="store_true", help="replace --out and any partial run")


def trainer_settings(args):
    """The TrainerSettings that a parsed command line asks for."""
    settings = TrainerSettings(args.learning_rate, save_every=args.save_every)
    for text in args.optimizer:
        settings = cli.changed_field(settings, "--optimizer", text)
    settings.check()
    return settings


def learning_rate(settings, step, total_steps):
    """Warm-up, then constant, or linear or cosine decay to zero at total_steps.  `step` counts
    from 0 over all rounds."""
    warmup = settings.warmup_steps
    scale = min(1.0, (step + 1) / warmup) if warmup else 1.0
    done = min(1.0, max(0, step - warmup) / max(1, total_steps - warmup))
    if settings.schedule == "linear":
        scale *= 1 - done
    if settings.schedule == "cosine":
        scale *= 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * scale


class Trainer:
    """What is trained of a policy (opd/masters.py), and AdamW on it."""

    def __init__(self, policy, settings):
        self.policy = policy
        self.settings = settings
        self.parts = masters_of(policy.model, settings.lora_rank)
        self.masters = [master for part in self.parts for master in part.masters.values()]
        # one pass over memory in place of ten; a tiny model gains nothing
        fused = sum(m.numel() for m in self.masters) > 10_000_000
        self.optimiser = torch.optim.AdamW(
            self.masters,
            lr=settings.learning_rate,
            betas=(0.9, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=fused,
        )

    def update(self):
        """Clips the gradient, takes one step, and returns the norm before the clip."""
        clip = self.settings.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.masters, clip if clip > 0 else math.inf)
        if not torch.isfinite(norm):
            raise BadInput(
                f"gradient norm is {float(norm)}: lower --learning-rate, or look for bad "
                f"log-probs in the inputs"
            )
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            for part in self.parts:
                part.write()
        return float(norm)

    def set_rate(self, rate):
        for group in self.optimiser.param_groups:
            group["lr"] = rate

    def named(self):
        """(name, master) of all."""
        return [pair for part in self.parts for pair in part.masters.items()]

    def save(self, folder, state, texts):
        """Writes a complete model folder and puts it on the disk.  state: the JSON part of
        trainer/;  texts: {name: content} of other files."""
        tensors = {}
        for name, master in self.named():
            for key, value in self.optimiser.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value.contiguous()
        for part in self.parts:
            tensors |= part.saved()
        try:
            remove(folder)  # what a killed run has left of it
            (folder / "trainer").mkdir(parents=True)
            self.policy.model.save_pretrained(folder)
            self.policy.tokenizer.save_pretrained(folder)
            save_file(tensors, folder / MOMENTS)
            state = state | {"lora_rank": self.settings.lora_rank}
            written = json.dumps(state, indent=1, default=str) + "\n"
            for name, text in {STATE: written, **texts}.items():
                (folder / name).write_text(text, encoding="utf-8")
            seal(folder)
        except (OSError, SafetensorError) as error:
            raise BadInput(
                f"{folder}: could not be written ({error}): make room and run the same command "
                f"again, it goes on from its last checkpoint"
            ) from None

    def load_optimiser(self, folder, moments=True):
        """Puts master weights and moments back.  A fresh optimiser has no moments, but what
        was learnt below the precision of the weights stays learnt."""
        path = folder / MOMENTS
        try:
            # tensor by tensor, read and not mapped: never two copies of the state in memory
            with safe_open(path, "pt", backend="pread") as saved:
                reads = {name: partial(saved.get_tensor, name) for name in saved.keys()}
                for part in self.parts:
                    part.restore(reads, folder)
                for name, master in self.named() if moments else ():
                    self._restore_moments(master, reads, name)
        except SafetensorError as error:
            raise BadInput(f"{path}: could not be loaded: {error}") from None

    def _restore_moments(self, master, reads, name):
        entry = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if read := reads.get(f"{key}/{name}"):
                on_cpu = key == "step" and not self.optimiser.defaults["fused"]
                entry[key] = read().to("cpu" if on_cpu else master.device)
        if entry:
            self.optimiser.state[master] = entry

    def load_weights(self, folder):
        """Puts the weights of a checkpoint back."""
        model = self.policy.model
        how = {"dtype": model.dtype, "use_safetensors": True}
        saved = type(model).from_pretrained(folder, **how, **NO_CODE)
        model.load_state_dict(saved.state_dict())


def run_identity(flags, source, weights, inputs, **more):
    """What determines the result of a run, as JSON.  flags: {name: value}, of which those are
    left out that change memory and speed alone;  source: the folder of the model, weights:
    their hash;  inputs: paths."""
    without = ("overwrite", "save_every", "micro_batch_tokens", "device", "compute")
    flags = flags | {"out": flags["out"].rstrip("/")}  # M/ is M
    return {
        "flags": {name: value for name, value in flags.items() if name not in without},
        "weights": weights,
        "config": hash_config(source),
        "inputs": {path: files.hash_file(path) for path in inputs},
        **more,
    }


# ---- a model folder on the disk

STATE = "trainer/state.json"
MOMENTS = "trainer/optimizer.safetensors"
LIST = "trainer/files.json"  # the last file of a folder: sizes and hashes of the others
CHANGED = "damaged or changed since it was saved"


def seal(folder):
    """Puts a folder on the disk, then the list of its files."""
    disk.sync_tree(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {path.relative_to(folder).as_posix(): files.hash_file(path) for path in paths}
    disk.write_atomically(folder / LIST, json.dumps(listed, indent=1) + "\n")
    disk.sync(folder.parent)


def damage(folder, spared=()):
    """The first file of a sealed folder that is not as it was written, in words, or None.  A
    folder of an earlier version has no list, and is taken as it is.  spared: names of files
    that somebody may have removed."""
    saved = read_json(folder / LIST)
    if not saved and (folder / LIST).exists():
        return f"{LIST}: expected a list of files"
    for name, wanted in saved.items():
        path = folder / name
        if name in spared and not path.exists():
            continue
        found = files.hash_file(path) if path.is_file() else None
        if found != wanted:
            return f"{name}: expected {show(wanted)}, got {show(found)}"
    if not read_json(folder / STATE):
        return f"{STATE}: expected a JSON object"
    return None


def read_json(path):
    """The JSON object in a file; {} if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def remove(folder):
    if folder.exists():
        shutil.rmtree(folder)


class Run:
    """A training run's folder, locked while the run is open.  `identity` is whatever determines
    its result, as JSON: a folder of another identity is refused.  `finished`: the summary of a
    run that is complete already."""

    def __init__(self, out, identity, source, reads, overwrite):
        """source: the folder it starts from;  reads: paths that --overwrite may not delete."""
        self.out = Path(out)
        if not self.out.name:
            raise BadInput(f"--out {out}: expected the name of a folder")
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.identity = identity
        self.source = source
        self.overwrite = overwrite
        self.finished = None
        self._lock()
        try:
            if self.out.exists() and self.out.samefile(source):
                raise BadInput(f"--out {out}: is the model to start from: give another --out")
            if overwrite:
                self._check_overwrite(reads)
            else:
                self._check_identity()
        except BaseException:
            self.close()
            raise

    def _lock(self):
        path = self.out.with_name(self.out.name + ".lock")
        try:
            disk.make_folder(path.parent)
            self.lock = disk.open_locked(path)
        except BlockingIOError:
            raise BadInput(
                f"{self.out}: another process is training into this folder: wait for it, or "
                f"give another --out"
            ) from None
        except OSError:
            self.lock = None  # nobody can write there; a finished run can still say so

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.lock:
            with self.lock, contextlib.suppress(OSError):  # Windows removes no open file
                os.unlink(self.lock.name)

    def _check_overwrite(self, reads):
        """Only a training run is replaced, and none that this run reads."""
        out = self.out
        filled = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if filled and not (out / STATE).exists():
            raise BadInput(
                f"--overwrite: replaces a training run, and {out} is none: give another --out"
            )
        for path in reads:
            inside = {out.resolve(), self.partial.resolve()} & {*Path(path).resolve().parents}
            for folder in inside:
                raise BadInput(
                    f"--overwrite: would delete {path}, which this run reads, with {folder}: "
                    f"give another --out"
                )

    def _check_identity(self):
        """The finished folder, the unfinished one and each of its checkpoints are of this
        run."""
        states = [folder / STATE for folder in self._checkpoints()]
        for path in (self.out / STATE, self.partial / "run.json", *states):
            before = read_json(path)
            difference = files.first_difference(before.get("run"), self.identity)
            if before and difference:
                raise BadInput(
                    f"{path}: holds another training run ({difference}): give another --out, "
                    f"or --overwrite"
                )
        if not self.out.exists():
            return
        if not (self.out / STATE).exists():
            raise BadInput(
                f"{self.out}: exists and is not a training run of this stage: give another "
                f"--out"
            )
        wrong = damage(self.out, spared=[MOMENTS])
        state = read_json(self.out / STATE)
        if not wrong and "summary" not in state:
            wrong = f"{STATE}: expected the summary of a finished run"
        if not wrong:
            self.finished = state["summary"]
            shutil.rmtree(self.partial, ignore_errors=True)  # a kill has left it
        elif not self._last_checkpoint():
            raise BadInput(f"{self.out}/{wrong}: {CHANGED}: --overwrite trains it again")
        else:
            print(f"{self.out}/{wrong}: {CHANGED}: its last steps are trained again")

    def _checkpoints(self):
        """The folders step-N, newest first."""
        found = [p for p in self.partial.glob("step-*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)

    def _last_checkpoint(self):
        """(folder, its state, the log up to it) of the newest checkpoint that is whole, or
        None.  One without a list of its files was half written, but for that of an earlier
        version which LATEST names."""
        latest = self.partial / "LATEST"
        latest = latest.read_text(errors="replace") if latest.exists() else ""
        logged = whole_lines(self.partial / "metrics.jsonl")
        for folder in self._checkpoints():
            state = read_json(folder / STATE)
            wrong = damage(folder)
            done = state.get("done", math.inf)
            if not wrong and len(logged) < done:
                wrong = f"../metrics.jsonl: expected {done} lines, got {len(logged)}"
            if not wrong and (folder.name == latest or (folder / LIST).exists()):
                return folder, state, logged[:done]
            if folder.name == latest:
                print(f"{folder}/{wrong}: {CHANGED}: goes on from an earlier checkpoint")
        return None

    def begin(self, trainer, fresh):
        """Goes on from the last checkpoint, or else with the starting folder's master weights,
        and with its moments and step count unless `fresh` or trained by another method; with
        nothing of a folder that was trained with another lora_rank but its weights."""
        self.trainer = trainer
        self.started = time.time()
        self.done = 0  # steps of this call
        self.before = {"step": 0, "tokens": 0}  # of the rounds before this call
        self.truncated = 0.0
        self.alarms = 0
        if self.overwrite:  # only now, when the new run's inputs are known to be good
            kept = self.partial / "replaced"
            if kept.exists() and not self.out.exists():  # a kill has left it there
                disk.rename_durably(kept, self.out)
            remove(self.partial)
        if saved := self._last_checkpoint():
            self._resume(*saved)
        else:
            disk.make_folder(self.partial)
            text = json.dumps({"run": self.identity}, indent=1)
            disk.write_atomically(self.partial / "run.json", text + "\n")
            (self.partial / "metrics.jsonl").unlink(missing_ok=True)
            self._continue_optimiser(fresh)
            self.tokens = self.before["tokens"]
        if self.out.exists():  # aside, and away with OUT.partial when this run is finished
            remove(self.partial / "replaced")
            disk.rename_durably(self.out, self.partial / "replaced")

    def _resume(self, folder, state, logged):
        self.trainer.load_weights(folder)
        self.trainer.load_optimiser(folder)
        self.done = state["done"]
        self.before = state["before"]
        self.tokens = state["tokens"]
        disk.write_atomically(self.partial / "metrics.jsonl", logged)
        for metrics in map(json.loads, logged):
            self.truncated = metrics["rollout/truncated"]
            self.alarms += metrics["alarm/collapse"]

    def _continue_optimiser(self, fresh):
        path = self.source / STATE
        if not path.exists():
            return
        if not (self.source / MOMENTS).exists():
            if fresh:
                return
            raise BadInput(
                f"{path.parent}: expected optimizer.safetensors beside state.json, but there "
                f"is none: give --fresh-optimizer to start without its moments"
            )
        state = read_json(path)
        if not state:
            raise BadInput(
                f"{path}: expected a JSON object: it is damaged; remove the folder's trainer/ "
                f"to start without its moments"
            )
        if state.get("lora_rank", 0) != self.trainer.settings.lora_rank:
            return  # another kind of masters: a new start from the folder's weights
        same = state["run"]["flags"]["method"] == self.identity["flags"]["method"]
        self.trainer.load_optimiser(self.source, moments=same and not fresh)
        if same and not fresh:
            self.before = {"step": state["step"], "tokens": state["tokens"]}

    def steps(self, count):
        """Yields (index in this call, step over all rounds) of the steps that are left, with
        the learning rate set."""
        settings = self.trainer.settings
        self.count = count
        total = settings.total_steps or self.before["step"] + count
        left = range(self.done, count)
        name = self.identity["flags"]["method"]
        bar = cli.progress(left, initial=self.done, total=count, desc=f"train {name}")
        with open(self.partial / "metrics.jsonl", "ab", buffering=0) as self.file:
            for index in bar:
                self.step = self.before["step"] + index
                self.rate = learning_rate(settings, self.step, total)
                self.trainer.set_rate(self.rate)
                yield index, self.step
                if (index + 1) % settings.save_every == 0 and index + 1 < count:
                    self._checkpoint(index + 1)

    def log(self, metrics):
        """Appends a step's metrics."""
        self.metrics = dict(metrics)
        alarm = float(collapsed(metrics, self.truncated))
        self.truncated = metrics["rollout/truncated"]
        self.alarms += alarm
        self.tokens += metrics["train/tokens"]
        self.metrics |= {
            "alarm/collapse": alarm,
            "train/learning_rate": self.rate,
            "train/tokens_total": self.tokens,
        }
        line = json.dumps({"step": self.step + 1} | self.metrics)
        disk.append_whole(self.file, line.encode() + b"\n")

    def _checkpoint(self, done):
        """Writes OUT.partial/step-N, then points LATEST at it: a kill or a power cut at any
        moment leaves a complete checkpoint.  The one before stays."""
        os.fsync(self.file.fileno())
        state = {
            "run": self.identity,
            "done": done,
            "before": self.before,
            "step": self.step + 1,
            "tokens": self.tokens,
        }
        name = f"step-{done}"
        self.trainer.save(self.partial / name, state, {})
        disk.write_atomically(self.partial / "LATEST", name)
        reached = [p for p in self._checkpoints() if int(p.name[5:]) <= done]
        for old in {*self._checkpoints()} - {*reached[:2]}:
            shutil.rmtree(old)

    def finish(self, extra, taught=None):
        """Moves the model into place and returns the summary, with `extra`.  taught: kept as
        sft_teacher.json, if there is any."""
        step = self.before["step"] + self.count
        summary = {
            "out": str(self.out),
            "steps": self.count,
            "step": step,
            "trained_tokens": self.tokens - self.before["tokens"],
            "loss": self.metrics["train/loss"],
            **extra,
            "seconds": round(time.time() - self.started, 2),
        }
        state = {
            "run": self.identity,
            "step": step,
            "tokens": self.tokens,
            "summary": summary,
        }
        texts = {"metrics.jsonl": (self.partial / "metrics.jsonl").read_text()}
        if taught:
            texts["sft_teacher.json"] = json.dumps(taught) + "\n"
        final = self.partial / "final"
        self.trainer.save(final, state, texts)
        disk.rename_durably(final, self.out)
        shutil.rmtree(self.partial)
        if self.alarms:
            print(
                f"{self.out}: WARNING: in {self.alarms:.0f} of {self.count} steps "
                f"at least 5 % of the texts were repetitive, or more than 90 % cut at their "
                f"longest twice in a row: length inflation (rollout/repetition, "
                f"rollout/truncated)"
            )
        return summary


def whole_lines(path):
    """The lines of a log up to the first that a kill or a power cut has spoilt."""
    if not path.exists():
        return []

    def whole(line):
        try:
            return line.endswith("\n") and bool(json.loads(line))
        except ValueError:
            return False

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return list(itertools.takewhile(whole, lines))
