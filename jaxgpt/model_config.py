"""The shape of one decoder-only transformer, wide enough for the families in `interop/families.py`.

The comment beside or above a field is its explanation on the command line."""

import dataclasses
import itertools
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args, get_origin

from jaxgpt.errors import ConfigError, require

VOCAB_MULTIPLE = 128  # the embedding's rows are rounded up to this
_BOUNDS = tomllib.loads(Path(__file__).with_name("bounds.toml").read_text("utf-8"))


class Section:
    """What the sections of a configuration have in common."""

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid"}
    section: ClassVar[str]  # what its fields are called by before their names: `data.` in DataConfig

    def __init_subclass__(cls) -> None:
        cls.section = cls.__name__.removesuffix("Config").lower() + "." if cls.__name__.endswith("Config") else ""

    def __post_init__(self) -> None:
        """Numbers are within bounds.toml, and Literal fields hold one of their words: elsewhere a misspelt
        one would silently mean the last."""
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
            bound = f"finite and at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
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
