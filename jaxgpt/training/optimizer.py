"""The update rule: Optax transformations chosen by the configuration, and the learning-rate schedule."""

import functools
from typing import Any

import jax
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, muon

from jaxgpt.config import OptimizerConfig
from jaxgpt.model import parameter_name

_of_each = functools.partial(functools.partial, jax.tree_util.tree_map_with_path)  # choose(path, p) -> tree -> tree


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then the configured shape down to `final_lr_ratio` of the peak at step `steps`."""
    peak, final = config.peak_lr, config.peak_lr * config.final_lr_ratio
    warmup = min(config.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    after = optax.constant_schedule(peak)
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, config.final_lr_ratio)
        case "linear":
            after = optax.linear_schedule(peak, final, rest)
        case "wsd":
            decay = min(max(int(steps * config.decay_fraction), 1), rest)
            after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    # Step 0 already learns: its rate is peak / (warmup + 1), not 0.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup) if warmup else optax.constant_schedule(peak)
    return optax.join_schedules([ramp, after], [warmup])


def decays(path: tuple[Any, ...]) -> bool:
    """Weight decay is for matrices and embeddings; by name, since a stacked norm [L, D] looks like a matrix."""
    return parameter_name(path).rsplit(".", 1)[-1] not in ("bias", "scale")


def _muon_dimensions(path: tuple[Any, ...], p: Array) -> MuonDimensionNumbers:
    """Which axes of a kernel [L, ...] are its input and its output."""
    if ".mlp." in (name := parameter_name(path)) and p.ndim == 4:
        return MuonDimensionNumbers((2,), (3,))  # each expert alone
    inputs = p.ndim - 2 if name.endswith("attention.output.kernel") else 1  # H and K are merged
    return MuonDimensionNumbers(tuple(range(1, 1 + inputs)), tuple(range(1 + inputs, p.ndim)))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, scale by the configured rule, add decoupled weight decay, scale by the learning rate.
    Sources: AdamW arXiv:1711.05101, Lion arXiv:2302.06675, Adafactor arXiv:1804.04235, Muon arXiv:2502.16982 (whose
    update has the size of AdamW's, so that one learning rate serves matrices and embeddings)."""
    rule = adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    match config.name:
        case "lion":
            rule = optax.scale_by_lion(config.beta1, config.beta2)
        case "adafactor":
            rule = optax.chain(
                optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
            )
        case "muon":
            axes = dict(muon_weight_dimension_numbers=_of_each(_muon_dimensions), consistent_rms=0.2)
            orthogonal = muon(-1.0, beta=config.beta1, eps=config.epsilon, **axes)
            # Optax's own choice for all else is Adam with Nesterov momentum, whose first steps are half as large again.
            label = _of_each(lambda path, _: "muon" if parameter_name(path).endswith(".kernel") else "adam")
            rule = optax.partition({"muon": _sharded_by_compiler(orthogonal), "adam": adam}, label)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        rule,
        optax.add_decayed_weights(config.weight_decay, _of_each(lambda path, _: decays(path))),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _sharded_by_compiler(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let the compiler lay out what is inside an update: Muon's products contract over axes that are cut."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if jax.sharding.get_abstract_mesh().empty:
            return rule.update(updates, state, params)
        layout = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(rule.update, out_sharding=layout)(updates, state, params)

    return optax.GradientTransformation(rule.init, update)
