"""The network: tokens in, hidden states and logits out. The only place that imports Flax."""

from jaxgpt.model.layers import axis_sizes
from jaxgpt.model.transformer import Cache, Transformer, new_cache, parameter_count, parameter_name

__all__ = ["Cache", "Transformer", "axis_sizes", "new_cache", "parameter_count", "parameter_name"]
