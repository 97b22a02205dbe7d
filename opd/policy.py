"""A policy in memory: weights, tokenizer, identity; prompts as token ids; hidden states."""

import contextlib
import ctypes
import hashlib
import json
import math
from functools import partial
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

from opd.chat import probe
from opd.kernel import all_logits
from opd.records import BadInput

# code of a model folder is never run, nor is a person asked whether to run it
NO_CODE = {"trust_remote_code": False}

# ---- a policy in memory


class Policy:
    """A causal language model with its tokenizer, its head as a plain matrix, and its identity.

    `identity` holds its name and short hashes: `model`, `weights`, `template`, `vocabulary`,
    `renders` (see identity_of), of a loaded folder also `config`.  Equal `weights` means the
    very same parameters; equal `vocabulary` means the same token -> id map, whatever the size
    of the embedding."""

    def __init__(self, model, tokenizer, name, weights, template_options=None):
        self.model = model
        self.tokenizer = tokenizer
        self.template_options = template_options or {}
        self.identity = identity_of(name, weights, tokenizer, self.template_options)
        # a tokenizer may know tokens that the model has no row for
        rows = len(model.get_input_embeddings().weight)
        self.vocabulary = min(vocabulary_size(tokenizer), rows)
        self.stop_ids = [i for i in stop_ids(model, tokenizer) if i < self.vocabulary]
        options = head_options(model, self.vocabulary)
        self.head_options = {"vocabulary": self.vocabulary} | options
        self.row_tokens = 0  # of rows that answers share (opd/shared.py); 0: they share none

    @property
    def device(self):
        return self.head.device

    @property
    def head(self):
        """The language-model head, [V, D]; opd/kernel.py's functions take it with
        `head_options`. Its rows beyond the vocabulary (embeddings are often padded to a round
        number) are no tokens: they take no probability, in sampling, scoring and training
        alike."""
        return self.model.get_output_embeddings().weight

    @property
    def positions(self):
        """How many tokens a sequence may have, its prompt included."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or math.inf

    @property
    def attends(self):
        """Whether a layer looks back at other tokens; Mamba's keep a state instead."""
        config = self.model.config.get_text_config()
        return set(getattr(config, "layer_types", None) or []) != {"linear_attention"}

    def check_length(self, tokens, where):
        """Raises BadInput for a sequence of more tokens than the model has positions: beyond
        them a learnt table ends, and rotary ones answer nonsense."""
        if tokens > self.positions:
            raise BadInput(
                f"{where}: expected at most {self.positions} tokens with the prompt, the "
                f"positions of {self.identity['model']}, got {tokens}"
            )


def load_policy(name, dtype="auto", device=None, template_options=None, weights=None):
    """Loads a folder, or a Hugging Face id through the hub's cache, as a Policy in evaluation
    mode.

    dtype: "auto" (as stored), "float32", "bfloat16" or "float16"; device: "cpu", "cuda", ...
    (default: GPU if any); weights: the hash of its weight files, where the caller has computed
    it already."""
    folder = find_folder(name)
    tokenizer = load_tokenizer(folder)
    model = load_weights(name, folder, "AutoModelForCausalLM", dtype, device)
    weights = weights or hash_weights(folder)
    policy = Policy(model, tokenizer, name, weights, template_options)
    policy.identity["config"] = hash_config(folder)
    return policy


def load_teacher(name, policy, dtype, device, template_options, weights, any_template):
    """The --teacher as a Policy that shares the student's token ids, and its template unless a
    mismatch is meant."""
    teacher = load_policy(name, dtype, device, template_options, weights)
    reasons = {
        "vocabulary": "their token ids mean different things",
        "template": "a teacher off its own template scores badly; pass --allow template if "
        "this is meant",
    }
    for field, reason in reasons.items():
        wanted, got = policy.identity[field], teacher.identity[field]
        same = any_template or same_template(teacher.identity, policy.identity)
        if wanted != got and not (field == "template" and same):
            raise BadInput(
                f"--teacher {name}: expected the {field} of {policy.identity['model']}, "
                f"{wanted}, got {got}: {reason}"
            )
    return teacher


def load_weights(name, folder, kind, dtype, device, **options):
    """A transformers model of class `kind` from the safetensors of a folder, in evaluation
    mode; `name` is what an error calls it."""
    transformers.utils.logging.disable_progress_bar()
    if not weight_files(folder):
        raise BadInput(
            f"{name}: expected safetensors weights in {folder}, found none (pickled "
            f"weights are never loaded)"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"dtype": dtype, "use_safetensors": True} | NO_CODE | options
    try:
        model = getattr(transformers, kind).from_pretrained(folder, **options).to(device)
    # truncated or foreign files, no such device, a config of nonsense
    except Exception as error:
        raise unloadable(f"model {name}", error) from None
    if is_emulated(model.dtype, model.device):
        print(
            f"WARNING: {name}: this processor has no {str(model.dtype)[6:]} arithmetic, it is "
            f"emulated and many times slower than --dtype float32, which takes twice the memory"
        )
    return model.eval()


def is_emulated(dtype, device):
    """Whether products of 16-bit numbers are computed without instructions for them."""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if kind is None or device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()


def load_tokenizer(name):
    """The tokenizer of a folder or Hugging Face id."""
    try:
        return AutoTokenizer.from_pretrained(find_folder(name), **NO_CODE)
    except BadInput:
        raise
    except Exception as error:  # files of nonsense
        raise unloadable(f"tokenizer of {name}", error) from None


def load_config(name, folder):
    """transformers' config of a folder; `name` is what an error calls it."""
    try:
        return transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
    except Exception as error:
        raise unloadable(f"model {name}", error) from None


def unloadable(what, error):
    said = " ".join(str(error).split())[:300]
    if "trust_remote_code" in said:
        said = "its classes are Python files of its own, which are never run"
    return BadInput(f"{what}: could not be loaded ({type(error).__name__}): {said}")


def find_folder(name):
    """The local folder of a model given as a folder or as a Hugging Face id."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise BadInput(
                f"{name}: expected a transformers model folder, but it has no config.json"
            )
        return Path(name)
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    # the hub raises a dozen unrelated types: bad name, no such repository, no network
    except Exception as error:
        raise BadInput(
            f"{name}: neither a model folder here nor a model that the hub could give "
            f"({type(error).__name__})"
        ) from None


def weight_files(folder):
    """The files that transformers loads the weights of a folder from, sorted: one, or the
    shards that its index names; [] if there is neither.  Other files are neither loaded nor
    hashed."""
    folder = Path(folder)
    if (folder / "adapter_config.json").exists():
        raise BadInput(
            f"{folder}: expected a whole model, got an adapter (adapter_config.json): merge it"
        )
    if "transformers_weights" in json_object(folder / "config.json"):
        raise BadInput(
            f"{folder}/config.json: transformers_weights: expected no such field: weights are "
            f"in model.safetensors or the files of its index"
        )
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    shards = json_object(index).get("weight_map")
    shards = sorted(set(map(str, shards.values()))) if type(shards) is dict else []
    for shard in shards or ["no weight_map"]:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadInput(
                f"{index}: expected names of safetensors files in this folder, got {shard!r}"
            )
        if not (folder / shard).is_file():
            raise BadInput(f"{index}: expected {shard}, which it names, but there is none")
    return [folder / shard for shard in shards]


def json_object(path):
    """The object in a small JSON file of a model folder; {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        value = None
    if type(value) is not dict:
        raise BadInput(f"{path}: expected a JSON object, got something else")
    return value


def hash_weights(folder):
    """Short sha256 over the weight files of a model folder."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:12]


# of config.json: what changes nothing that is computed, or is recorded elsewhere (dtype)
IDLE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


def hash_config(folder):
    """Short sha256 over what else decides what a model folder computes: config.json, the
    tokens that end an answer, and the files that cut text into tokens.  Equal weights may have
    different ones."""
    config = json_object(Path(folder) / "config.json")
    ends = json_object(Path(folder) / "generation_config.json").get("eos_token_id")
    kept = {name: value for name, value in config.items() if name not in IDLE}
    digest = hashlib.sha256(json.dumps([kept, ends], sort_keys=True).encode())
    for name in TOKENIZER_FILES:
        if (Path(folder) / name).is_file():
            digest.update(name.encode() + (Path(folder) / name).read_bytes())
    return digest.hexdigest()[:12]


def identity_of(name, weights, tokenizer, template_options):
    """The `policy` object of a record.  `renders` is what the template makes of a few
    conversations: equal for templates whose texts differ where no prompt goes."""

    def short(value):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

    return {
        "model": str(name),
        "weights": weights,
        "template": short([tokenizer.chat_template, template_options]),
        "vocabulary": short(tokenizer.get_vocab()),
        "renders": short(probe(tokenizer, template_options)),
    }


def same_template(policy, ours, tools=False):
    """Whether the template of a record's `policy` shows a model what that of `ours` does: by
    its text or, where no tools are told of, by what it renders."""
    if policy.get("template") == ours["template"]:
        return True
    return not tools and policy.get("renders") == ours["renders"] is not None


def vocabulary_size(tokenizer):
    """One more than the largest token id; not len(tokenizer), for ids may have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def check_tokens(rollout, where, identity, vocabulary, fields=("vocabulary", "template")):
    """Raises BadInput unless a model with this identity reads the rollout's ids as the tokens
    they are."""
    got = rollout["policy"]
    for field in fields:
        same = got.get(field) == identity[field]
        if not same and field == "template":
            same = same_template(got, identity, "calls" in rollout)
        if not same:
            raise BadInput(
                f"{where}: policy.{field}: expected {identity[field]}, that of "
                f"{identity['model']}, got {got.get(field)}: the rollouts were "
                "sampled with another tokenizer or chat template, and their ids mean "
                "something else to this model"
            )
    check_ids(rollout["prompt_ids"] + rollout["response_ids"], where, vocabulary, identity)


def check_ids(ids, where, vocabulary, identity):
    """Raises BadInput for a token id that the model has no row for."""
    if max(ids, default=0) >= vocabulary:
        raise BadInput(
            f"{where}: expected token ids below {vocabulary}, the vocabulary of "
            f"{identity['model']}, got {max(ids)}"
        )


def stop_ids(model, tokenizer):
    """The ids that end an answer: the generation config's (an id or a list) and the tokenizer's
    end token."""
    ids = model.generation_config.eos_token_id
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    return sorted(set(ids) | ({tokenizer.eos_token_id} - {None}))


def head_candidates(config):
    """[{"scale", "softcap"}] that a config may mean: architectures use one name for a factor
    and for a divisor."""
    scales = [1.0]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if isinstance(factor, (int, float)) and factor:
            scales += [factor, 1 / factor]
    softcap = getattr(config, "final_logit_softcapping", None) or None
    return [{"scale": scale, "softcap": cap} for cap in (softcap, None) for scale in scales]


@torch.no_grad()
def head_options(model, vocabulary):
    """{"scale", "softcap"} with which opd/kernel.py's logits are this model's own: the
    candidate that is right on a few tokens.

    A head that does anything else (a bias, a LoRA adapter, a second matrix) is refused, not
    approximated."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        raise BadInput(
            f"model head: expected a plain torch.nn.Linear, got {type(head).__name__}"
        )
    if head.bias is not None:
        raise BadInput(
            "model head: has a bias, which the fused log-prob kernel does not handle"
        )
    ids = torch.arange(min(8, vocabulary), device=head.weight.device)[None]
    own = model(input_ids=ids).logits[0].float()
    hidden = model.get_decoder()(input_ids=ids).last_hidden_state[0].to(head.weight.dtype)
    best = {}
    smallest = math.inf
    for candidate in head_candidates(model.config.get_text_config()):
        ours = all_logits(hidden, head.weight, **candidate).float()
        error = (ours - own).abs().max().item()
        if not math.isfinite(error):
            error = math.inf
        if not best or error < smallest:
            best = candidate
            smallest = error
    tolerance = 0.02 * (own.abs().max().item() + 1)
    if torch.isfinite(own).all() and not smallest <= tolerance:
        raise BadInput(
            f"model head: its logits are not hidden @ head.T, scaled or soft-capped as its "
            f"config says (off by {smallest:.3g}): it does something that the fused log-prob "
            f"kernel does not handle"
        )
    return best


# ---- batches and forward


def token_batches(lengths, budget):
    """Indices grouped so that (rows x longest row) of a group is at most `budget`, longest
    first.

    token_batches([3, 9, 4], 10) -> [[1], [2, 0]].  A row longer than the budget gets a batch of
    its own."""
    batches = []
    widest = 0
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
    head = (model.get_output_embeddings() or model.get_input_embeddings()).weight
    device = head.device
    padded = None if bool(mask.all()) else mask.to(device)
    hidden = model.get_decoder()(
        input_ids=ids.to(device), attention_mask=padded, use_cache=False
    ).last_hidden_state
    # some keep a residual in float32, and round where the head begins
    return hidden.flatten(0, 1)[flat.to(device)].to(head.dtype)


def checkpoint_layers(model):
    """Gradient checkpointing: of every layer only the input is kept, and the rest is computed
    again in the backward pass: the same bits, less memory, more time."""
    kind = transformers.modeling_layers.GradientCheckpointingLayer
    layers = [m for m in model.modules() if isinstance(m, kind)]
    if not layers or not model.supports_gradient_checkpointing:
        raise BadInput(
            f"--compute gradient_checkpointing=1: expected a model whose layers transformers "
            f"can checkpoint, got {type(model).__name__}"
        )
    for layer in layers:
        # transformers' own switch works in training mode only, which switches dropout on
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )
    # glibc keeps freed blocks below 32 MB, in pieces between the gradients that stay; with a
    # fixed M_MMAP_THRESHOLD (-3) of 1 MB they go back to the system (no other libc has it)
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)


def response_positions(prompt_ids, loss_mask):
    """Where the hidden states stand that predict the loss-bearing response tokens (mask 1)."""
    return [len(prompt_ids) - 1 + t for t, m in enumerate(loss_mask) if m]


def likeliest(policy, hidden, k):
    """Ids of the k likeliest tokens (at most the whole vocabulary) after each hidden state, [N,
    k], best first.

    Finding them needs the logits; a slice of tokens at a time keeps those small."""
    found = []
    for part in hidden.split(max(1, (32 << 20) // policy.vocabulary)):
        logits = all_logits(part, policy.head, **policy.head_options)
        found.append(logits.topk(min(k, policy.vocabulary)).indices)
    return torch.cat(found)


def add_place_flags(p):
    """Where a model is, and how its chat template is used: also for the training commands."""
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    p.add_argument(
        "--template-options",
        type=json.loads,
        default={},
        metavar="JSON",
        help="handed to the chat template, e.g. '{\"enable_thinking\": false}'",
    )


def add_model_flags(p):
    """How a model is loaded."""
    p.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: as the folder stores it",
    )
    add_place_flags(p)


def add_tokenizer_flag(p):
    """Which folder speaks for a served model; `check_tokenizer_flag` refuses it for others."""
    p.add_argument(
        "--tokenizer",
        help="served models: folder whose template and vocabulary the server uses (default: "
        "--model if a folder)",
    )


def check_tokenizer_flag(tokenizer, base_url):
    if tokenizer and not base_url:
        raise BadInput(
            "--tokenizer: expected --base-url beside it, got none: a model that is loaded here "
            "has its own"
        )


def served_policy(model, tokenizer=None, template_options=None):
    """(tokenizer, `policy` object) of a served model; (None, hashes that are null) when no
    folder is at hand.

    The folder is `tokenizer`, or `model` if that is a model folder.  That the server really
    runs these weights is the caller's word: train.py's rollout/logprob_gap_mean shows when it
    is not so."""
    name = tokenizer
    if name is None and (Path(model) / "config.json").is_file():
        name = model
    if name is None:
        unknown = dict.fromkeys(("weights", "template", "vocabulary"))
        return None, {"model": model} | unknown
    folder = find_folder(name)
    loaded = load_tokenizer(name)
    weights = hash_weights(folder) if weight_files(folder) else None
    identity = identity_of(model, weights, loaded, template_options or {})
    return loaded, identity | {"config": hash_config(folder)}


def lasting_identity(identity):
    """The identity without what its template renders, which the date may change."""
    return {name: value for name, value in identity.items() if name != "renders"}


def resume_identity(identity):
    """What must not change while a file is completed: the weights where they are known,
    whatever path they were loaded from."""
    kept = lasting_identity(identity)
    if kept["weights"] is None:
        return kept
    return {name: value for name, value in kept.items() if name != "model"}
