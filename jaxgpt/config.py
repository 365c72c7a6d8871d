"""Every setting of a run, as frozen dataclasses that refuse illegal values when they are made, and as files: presets in
Python, JSON that round-trips, and what differs between two of them.

Few fields, the rest are properties. The same classes make the command line (tyro), where the comment behind or above a
field explains it, the presets in `configs/` and `config.json` in the run directory."""

import dataclasses
import itertools
import json
import math
import runpy
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from jaxgpt.errors import ConfigError, JaxgptError, nearest, require
from jaxgpt.files import cache_home, read_json

VOCAB_MULTIPLE = 128  # the embedding's rows are rounded up to this
ROOT = Path(__file__).parents[1]
_UNUSED = {"adafactor": ("beta1", "beta2", "epsilon"), "lion": ("epsilon",)}  # by an optimizer
_BOUNDS = tomllib.loads(Path(__file__).with_name("bounds.toml").read_text("utf-8"))


class Section:
    """What the sections of a configuration have in common."""

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid"}
    section: ClassVar[str]  # what its fields are called by before their names: `data.` in DataConfig

    def __init_subclass__(cls) -> None:
        cls.section = cls.__name__.removesuffix("Config").lower() + "." if cls.__name__.endswith("Config") else ""

    def __post_init__(self) -> None:
        """Numbers are within bounds.toml, Literal fields one of their words: a misspelt one would mean the last."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value, choices = getattr(self, f.name), get_args(f.type)
            if get_origin(f.type) is Literal and value not in choices:
                raise ConfigError(f"{self.section}{f.name} is {value!r}: it must be one of {', '.join(choices)}")
        for name, (low, high) in _BOUNDS[self.section.strip(".") or "sampling"].items():
            self.within(low, high, name)

    def within(self, low: float, high: float, name: str) -> None:
        """Raise ConfigError when a field is outside [low, high], infinite, or NaN; None is left out."""
        value = getattr(self, name)
        if value is not None and (not low <= value <= high or value == math.inf):
            bound = f"finite and at least {low:.9g}" if high == math.inf else f"between {low:.9g} and {high:.10g}"
            raise ConfigError(f"{self.section}{name} is {value!r:.50}: it must be {bound}")


@dataclass(frozen=True)
class ModelConfig(Section):
    """One decoder-only transformer; the defaults are GPT-2's choices."""

    n_layers: int = 12  # Number of transformer blocks (L).
    d_model: int = 768  # Width of the residual stream (D).
    n_heads: int = 12  # Query heads (H).
    n_kv_heads: int | None = None  # Key/value heads (G); fewer than n_heads is grouped-query. Default: n_heads.
    head_dim: int | None = None  # Width of one head (K). Default: d_model / n_heads.
    d_ff: int | None = None  # Hidden width of the feed-forward network (F). Default: 4 * d_model.
    context_length: int = 1024  # Tokens in one training sequence, and the largest position.
    vocab_size: int | None = None  # Vocabulary (V). Default: that of the tokenizer.
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"  # What tells the order of tokens.
    rope_theta: float = 10_000.0  # Base of the rotary frequencies.
    local_rope_theta: float | None = None  # Base on layers with a window, never scaled. Default: as on the others.
    rope_fraction: float = 1.0  # Share of each head, from its first dimension on, that is rotated.
    rotary_layers: tuple[bool, ...] = ()  # Whether each layer rotates, repeated over the layers. Default: all do.
    rope_scaling: Literal["none", "linear", "llama3", "longrope"] = "none"  # How frequencies stretch to longer texts.
    rope_factor: float = 1.0  # With linear and llama3: how many times slower the slow frequencies turn.
    rope_low_frequency: float = 1.0  # With llama3: frequencies with fewer turns in the original context are slowed.
    rope_high_frequency: float = 4.0  # With llama3: frequencies with more turns than this stay.
    rope_original_context: int = 8192  # With llama3 and longrope: context length of the training before.
    rope_short_factors: tuple[float, ...] = ()  # With longrope: divides each frequency up to the original context.
    rope_long_factors: tuple[float, ...] = ()  # With longrope: divides each frequency in longer texts.
    rope_attention_factor: float = 1.0  # With longrope: multiplies rotated queries and keys.
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # Kind of normalisation.
    # pre (GPT-2): x + f(norm(x)). post: norm(x + f(x)). output (OLMo 2): x + norm(f(x)). both (Gemma): both norms.
    norm_position: Literal["pre", "post", "output", "both"] = "pre"
    norm_epsilon: float = 1e-5  # Added to the variance.
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu_tanh"  # Non-linearity of the feed-forward network.
    gated_mlp: bool = False  # Multiply the activation by a second projection (SwiGLU, GeGLU).
    n_experts: int = 0  # Feed-forward networks (E), of which a router takes some for each token; 0 is one alone.
    experts_per_token: int = 2  # Experts that each token is sent to.
    normalize_experts: bool = True  # Let the weights of a token's experts add up to 1.
    attention_bias: bool = True  # Biases in the query, key and value projections.
    attention_output_bias: bool | None = None  # A bias in attention's output projection. Default: as attention_bias.
    mlp_bias: bool = True  # Biases in the feed-forward network.
    norm_bias: bool = True  # A bias in LayerNorm.
    norm_plus_one: bool = False  # Multiply by 1 + scale, as in Gemma, so that a scale decays towards 1.
    qk_norm: Literal["none", "head", "all"] = "none"  # RMS-normalise queries and keys: each head, or all together.
    query_scalar: float | None = None  # Attention scores are divided by its square root. Default: head_dim.
    attention_softcap: float | None = None  # c * tanh(scores / c) on attention scores.
    logit_softcap: float | None = None  # c * tanh(logits / c) on the output logits.
    windows: tuple[int, ...] = ()  # Sliding windows, repeated over the layers; 0 sees everything. (1024, 0) alternates.
    tie_embeddings: bool = True  # Use the token embedding as the output projection.
    scale_embeddings: bool = False  # Multiply token embeddings by sqrt(d_model).
    dropout: float = 0.0  # Dropped share of the embeddings and of each block's outputs while training.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Arithmetic of the activations; parameters stay float32.
    scan_layers: bool = True  # Compile one layer and loop over it, instead of unrolling all layers.
    kernels: Literal["auto", "xla"] = "auto"  # In training: those that the device has, where they can do all, or XLA's.
    remat: Literal["none", "dots", "full"] = "none"  # What backward recomputes: nothing, all but products, or all.
    # Both: N(0, 0.02), and N(0, 0.02 / sqrt(2L)) into the residual stream; gpt2: N(0, 0.01) for learned positions.
    init: Literal["gpt2", "nanogpt"] = "gpt2"

    def __post_init__(self) -> None:
        super().__post_init__()
        heads, width = self.n_heads, self.d_model
        uneven = f"model.d_model {width} does not divide by model.n_heads {heads}; change one or set model.head_dim"
        require(self.head_dim is not None or width % heads == 0, uneven)
        uneven = f"model.n_heads {heads} does not divide by model.n_kv_heads {self.n_kv_heads}; change one of them"
        require(heads % self.kv_heads == 0, uneven)
        if self.positions == "rotary":
            even, named = self.rotary_dim % 2 == 0 < self.rotary_dim, f"model.head_dim {self.key_dim}"
            require(even, f"{named} times model.rope_fraction {self.rope_fraction} must be even for rotary positions")
        if self.positions == "sinusoidal":
            require(self.d_model % 2 == 0, f"model.d_model {self.d_model} must be even for sinusoidal positions")
        legal = all(type(window) is int and 0 <= window < 2**31 for window in self.windows)
        require(legal, f"model.windows {self.windows[:9]}: sizes must be integers, 0 or more and below 2^31")
        if self.n_experts:
            legal = self.gated_mlp and not self.mlp_bias and self.experts_per_token <= self.n_experts
            require(legal, "model.n_experts: experts need gated_mlp, no mlp_bias, experts_per_token <= n_experts")
        if self.rope_scaling == "longrope":
            sizes = {len(self.rope_short_factors), len(self.rope_long_factors), self.rotary_dim // 2}
            require(len(sizes) == 1, f"model.rope_long_factors: longrope needs {self.rotary_dim // 2} of each")
            legal = all(1e-6 <= factor <= 1e6 for factor in (*self.rope_short_factors, *self.rope_long_factors))
            require(legal, "model.rope_long_factors: those of longrope must be between 1e-06 and 1e+06")
        if self.rope_scaling == "llama3":
            low, high = self.rope_low_frequency, self.rope_high_frequency
            require(low < high, f"model.rope_high_frequency {high} must be above model.rope_low_frequency {low}")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def key_dim(self) -> int:
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        return int(self.key_dim * self.rope_fraction)

    @property
    def ff_dim(self) -> int:
        return 4 * self.d_model if self.d_ff is None else self.d_ff

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding: 50257 divides over no mesh, and 128 fills a TPU's lanes."""
        return -(-(self.vocab_size or 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """The window of each layer; 0 where the layer sees everything."""
        return tuple(itertools.islice(itertools.cycle(self.windows or (0,)), self.n_layers))

    @property
    def layers_rotate(self) -> tuple[bool, ...]:
        return tuple(itertools.islice(itertools.cycle(self.rotary_layers or (True,)), self.n_layers))


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
    """`value`, of JSON's types, as a dataclass. Raises ConfigError, naming the field, and what the dataclass raises."""
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
