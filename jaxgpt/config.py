"""Every setting of a run, as frozen dataclasses that refuse illegal values when they are made, and as files: presets in
Python, JSON that round-trips, and what differs between two of them.

Few fields, the rest are properties. The same classes make the command line (tyro), where the comment behind or above a
field explains it, the presets in `configs/` and `config.json` in the run directory."""

import dataclasses
import json
import math
import runpy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from jaxgpt.errors import ConfigError, JaxgptError, nearest, require
from jaxgpt.files import cache_home, read_json
from jaxgpt.model_config import ModelConfig as ModelConfig
from jaxgpt.model_config import Section

ROOT = Path(__file__).parents[1]
_UNUSED = {"adafactor": ("beta1", "beta2", "epsilon"), "lion": ("epsilon",)}  # by an optimizer


@dataclass(frozen=True)
class TokenizerConfig(Section):
    """A SentencePiece model: an existing one, or how to train one on the corpus."""

    path: str | None = None  # An existing SentencePiece .model file; nothing is trained then.
    kind: Literal["bpe", "unigram"] = "bpe"  # Algorithm of the tokenizer that is trained.
    vocab_size: int = 4096  # Pieces of the trained tokenizer, special tokens and 256 bytes included.
    # Chat markers, beside pad, bos and eos; plain text can never produce them.
    special_tokens: tuple[str, ...] = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    training_bytes: int = 10_000_000  # Bytes of text that the tokenizer is trained on, taken evenly from the corpus.

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within(256 + 4 + len(self.special_tokens), math.inf, "vocab_size")
        special = self.special_tokens
        legal = len(set(special)) == len(special) and all(special)
        require(legal, f"tokenizer.special_tokens {special}: each must be different and not empty")


@dataclass(frozen=True)
class DataConfig(Section):
    """Where the text comes from and how it becomes batches."""

    # Files, directories or globs of .txt .md .py .jsonl .jsonl.gz .parquet; a prepared
    # directory; or @python (this interpreter's standard library) or @shakespeare (38 plays).
    paths: tuple[str, ...] = ("@python",)
    weights: tuple[float, ...] = ()  # Mixture weights, one for each path; without them all paths are one corpus.
    text_key: str = "text"  # Field or column that holds the text in .jsonl and .parquet.
    val_fraction: float = 0.02  # Share of the documents that are held out for evaluation.
    max_bad_documents: int = 0  # Stop when more documents cannot be read; the skipped ones are counted and listed.
    shard_tokens: int = 64 * 2**20  # Tokens in one shard file.
    cache_dir: str = ""  # Where prepared corpora are kept. Default: $XDG_CACHE_HOME/jaxgpt or ~/.cache/jaxgpt.

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.paths) > 0, "data.paths is empty: name at least one file, directory or glob")
        given, paths = len(self.weights), len(self.paths)
        require(given in (0, paths), f"data.weights has {given} numbers for {paths} data.paths: give one for each path")
        require(all(0 < w < math.inf for w in self.weights), f"data.weights {self.weights}: each must be positive")

    @property
    def cache_path(self) -> Path:
        return Path(self.cache_dir or cache_home())


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """The update rule (Optax), its learning-rate schedule, and what keeps it stable."""

    # Update rule. muon orthogonalises the matrices' momentum (beta1 0.95 is usual); all else takes AdamW.
    # adafactor has no betas and no epsilon of its own, lion no epsilon.
    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    peak_lr: float = 6e-4  # Learning rate after warm-up.
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"  # Shape after warm-up; wsd: flat, then linear.
    warmup_steps: int = 100  # Steps of linear warm-up.
    final_lr_ratio: float = 0.1  # Last learning rate over the peak.
    decay_fraction: float = 0.2  # With wsd: the share of all steps that decays.
    beta1: float = 0.9  # Decay of the first moment (momentum).
    beta2: float = 0.95  # Decay of the second moment.
    epsilon: float = 1e-8  # Added to the root of the second moment.
    weight_decay: float = 0.1  # Decoupled decay of matrices and embeddings; never of norms and biases.
    clip_norm: float = 1.0  # Largest global gradient norm; 0 turns clipping off.
    ema_decay: float = 0.0  # Decay of a moving average of the parameters, used to evaluate and sample; 0 is off.

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _UNUSED.get(self.name, ()):
            value, default = getattr(self, name), getattr(OptimizerConfig, name)
            message = f"optimizer.{name} is {value}, but {self.name} does not use it; leave it at {default}"
            require(value == default, message)


@dataclass(frozen=True)
class TrainingConfig(Section):
    """The loop: how long, how much at a time, what is reported."""

    steps: int = 1000  # Optimizer updates.
    batch_size: int = 32  # Sequences in one update, over all devices.
    accumulation_steps: int = 1  # Parts that a batch is cut into when it does not fit; the result is the same.
    seed: int = 0  # Decides the initial parameters, the order of the data and dropout.
    log_every: int = 10  # Steps between training records.
    eval_every: int = 250  # Steps between evaluations; 0 evaluates only at the end.
    eval_batches: int = 20  # Batches in one evaluation, spread evenly over the held-out text; 0 takes all of it.
    z_loss: float = 0.0  # Weight of the squared log-partition, which keeps logits near zero.
    router_balance_loss: float = 0.01  # With experts: weight of the loss that spreads tokens evenly over them.
    router_z_loss: float = 0.001  # With experts: weight of the squared log-partition of the router.
    loss_chunks: int = 8  # Parts that the sequence is cut into so that only one part's logits exist at a time.
    sample_prompt: str = ""  # Prompt of the sample that is printed at the end.
    sample_tokens: int = 80  # Length of that sample; 0 prints none.
    wandb: bool = False  # Also log to Weights & Biases (`pip install wandb`).

    def __post_init__(self) -> None:
        super().__post_init__()
        size, parts = self.batch_size, self.accumulation_steps
        require(size % parts == 0, f"training.batch_size {size} does not divide by training.accumulation_steps {parts}")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """When the state is saved and which saves stay."""

    every: int = 250  # Steps between saves; the last step is always saved.
    keep_last: int = 2  # Newest checkpoints that stay.
    keep_every: int = 0  # Also keep each checkpoint whose step is a multiple of this; 0 keeps none.
    on_save_error: Literal["stop", "continue"] = "stop"  # After a failed save (disk full): stop, or go on to the next.


@dataclass(frozen=True)
class MeshConfig(Section):
    """Devices along each axis of the mesh; -1 takes all that are left."""

    data: int = -1  # Copies of the model, each with its part of the batch.
    fsdp: int = 1  # Parts that parameters and optimizer state are cut into, gathered layer by layer.
    tensor: int = 1  # Parts that heads, feed-forward and vocabulary are cut into.

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        legal = sizes.count(-1) <= 1 and all(size == -1 or size >= 1 for size in sizes)
        require(legal, f"mesh {sizes}: sizes must be at least 1, and one of them can be -1")

    @property
    def size(self) -> int | None:
        """Devices in all; None when that is as many as there are."""
        sizes = (self.data, self.fsdp, self.tensor)
        return None if -1 in sizes else math.prod(sizes)


@dataclass(frozen=True)
class TrainConfig(Section):
    """A whole run."""

    name: str = "gpt"  # Names the run.
    run_dir: str = ""  # Directory of config, tokenizer, checkpoints and metrics. Default: runs/NAME.
    allow_change: tuple[str, ...] = ()  # Settings, such as training.steps, that may differ when a run is resumed.
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, f"name {self.name!r}: it must be a plain word")
        chunks, length = self.training.loss_chunks, self.model.context_length
        require(length % chunks == 0, f"model.context_length {length} does not divide by training.loss_chunks {chunks}")

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")


def to_json(config: TrainConfig) -> str:
    """The configuration as indented JSON, of which `validated` makes the same object again."""
    return TypeAdapter(TrainConfig).dump_json(config, indent=2).decode() + "\n"


def validated(kind: type, value: Any, where: str) -> Any:
    """`value`, of JSON's types, as an instance of a dataclass. Raises ConfigError, naming the field, for one that is
    unknown or of another type, and what the dataclass raises."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "unexpected_keyword_argument":
            near = nearest(place.rpartition(".")[2], _names(kind))
            raise ConfigError(f"{where}: unknown key {place}{near}") from None
        raise ConfigError(": ".join(filter(None, [where, place, first["msg"]]))) from None  # a lone surrogate: no place


def _names(kind: Any) -> Iterator[str]:
    """The fields of a dataclass, and of those in it."""
    for f in dataclasses.fields(kind):
        yield f.name
        if dataclasses.is_dataclass(f.type):
            yield from _names(f.type)


def load_preset(name: str) -> TrainConfig:
    """The TrainConfig that `config()` in a Python file returns, or that a .json file holds. A relative path is looked
    up here, then beside train.py. Raises ConfigError when there is no such preset."""
    path = next((path for path in (Path(name), ROOT / name) if path.is_file()), None)
    if path is None:
        presets = [f"configs/{preset.name}" for preset in sorted((ROOT / "configs").glob("*.py"))]
        near = nearest(name, presets) or f"; there are {', '.join(presets) or 'none here, so give a path'}"
        raise ConfigError(f"configuration {name}: there is no such file{near}")
    if path.suffix == ".json":
        return validated(TrainConfig, read_json(path, limit=2**20), str(path))
    require(path.suffix == ".py", f"configuration {name}: it must be a .py preset or a .json file")
    try:
        config = runpy.run_path(str(path)).get("config", lambda: None)()
    except JaxgptError:
        raise
    except Exception as error:  # the user's own code; the usual mistake is a field that does not exist
        near = nearest(str(error).rpartition("keyword argument '")[2].rstrip("'"), _names(TrainConfig))
        what = f"{type(error).__name__}: {error}{near}"  # newer Pythons propose a field themselves
        raise ConfigError(f"configuration {name}: {what}; mend it, --debug shows where") from error
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"configuration {name}: it must define a function config() that returns a TrainConfig")
    return config


def differences(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Every field of nested dataclasses that differs, as `section.field -> (old, new)`."""
    found: dict[str, tuple[Any, Any]] = {}
    for f in dataclasses.fields(new):
        name, before, after = prefix + f.name, getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(after):
            found |= differences(before, after, f"{name}.")
        elif before != after:
            found[name] = before, after
    return found
