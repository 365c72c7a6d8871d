"""One training step as a pure function, `train_step(state, batch) -> (state, metrics)`, with its update rule (Optax).
Letters: A accumulation steps, B batch, T length, D model width, V vocabulary."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, muon

from jaxgpt.config import OptimizerConfig, TrainConfig
from jaxgpt.data.loader import Batch
from jaxgpt.kernels.cross_entropy import LossOptions, linear_cross_entropy
from jaxgpt.model import Transformer, parameter_name

Metrics = dict[str, Array]
_of_each = functools.partial(functools.partial, jax.tree_util.tree_map_with_path)  # choose(path, p) -> tree -> tree


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then the configured shape down to `final_lr_ratio` of the peak at step `steps`."""
    peak, final = config.peak_lr, config.peak_lr * config.final_lr_ratio
    warmup = min(config.warmup_steps, steps)
    rest, after = max(steps - warmup, 1), optax.constant_schedule(peak)
    match config.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, config.final_lr_ratio)
        case "linear" | "wsd":
            decay = rest if config.schedule == "linear" else min(max(int(steps * config.decay_fraction), 1), rest)
            after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    # Step 0 already learns: its rate is peak / (warmup + 1), not 0.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup) if warmup else optax.constant_schedule(peak)
    return optax.join_schedules([ramp, after], [warmup])


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
            rule = optax.adafactor(-1.0)  # whose sign, as muon's, is that of an update
        case "muon":
            axes = dict(muon_weight_dimension_numbers=_of_each(_muon_dimensions), consistent_rms=0.2)
            orthogonal = muon(-1.0, beta=config.beta1, eps=config.epsilon, **axes)
            # Optax's own choice for all else is Adam with Nesterov momentum, whose first steps are half as large again.
            label = _of_each(lambda path, _: "muon" if parameter_name(path).endswith(".kernel") else "adam")
            rule = optax.partition({"muon": _sharded_by_compiler(orthogonal), "adam": adam}, label)
    # By name: a stacked norm [L, D] looks like a matrix.
    decays = _of_each(lambda path, _: not parameter_name(path).endswith((".bias", ".scale")))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        rule,
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def _sharded_by_compiler(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let the compiler lay out what is inside an update: Muon's products contract over axes that are cut."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        layout = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(rule.update, out_sharding=layout)(updates, state, params)

    return optax.GradientTransformation(rule.init, update)


class TrainState(NamedTuple):
    """All that a step reads and writes; every leaf is an array with its sharding."""

    step: Array  # updates done, int32
    model: Transformer  # what is evaluated and generates: the moving average, where `optimizer.ema_decay` is set
    optimizer: Any
    raw_model: Transformer | None  # what learns, where `model` is its average

    @property
    def rest(self) -> dict[str, Any]:
        """What a checkpoint holds beside the model."""
        return {name: part for name, part in self._asdict().items() if name != "model"}


def init_state(config: TrainConfig, model: Transformer | None = None) -> TrainState:
    """The state before step 0, of a given model or else of the seed. Jit it, so that parameters are born sharded."""
    model = model or Transformer(config.model, jax.random.key(config.training.seed))
    optimizer = make_optimizer(config.optimizer, config.training.steps).init(model)
    raw_model = jax.tree.map(jnp.copy, model) if config.optimizer.ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer, raw_model)


def loss_options(config: TrainConfig) -> LossOptions:
    model, training = config.model, config.training
    return LossOptions(model.vocab_size or 0, model.logit_softcap, training.z_loss, training.loss_chunks)


def batch_loss(
    model: Transformer, batch: Batch, weights_BT: Array, options: LossOptions, dropout_key: Array | None = None
) -> tuple[Array, Array, Array | None]:
    """Weighted sum of the token losses (with z-loss), those of each token [B, T] in nats, and those of any routers."""
    x_BTD, _, router = model(batch.tokens, batch.positions, batch.segment_ids, dropout_key=dropout_key)
    return *linear_cross_entropy(x_BTD, model.output_embedding(), batch.labels, weights_BT, options), router


def _gradients(model: Transformer, batch: Batch, config: TrainConfig, key: Array | None) -> tuple[Array, Metrics, Any]:
    """Tokens, mean losses and their gradients, over all labels of the batch, one part of the rows at a time."""
    options, parts = loss_options(config), config.training.accumulation_steps
    real_BT = batch.labels >= 0
    tokens = real_BT.sum()
    weights_BT = real_BT / jnp.maximum(tokens, 1)

    def loss(model: Transformer, batch: Batch, weights_BT: Array, key: Array | None) -> tuple:
        total, losses_BT, router = batch_loss(model, batch, weights_BT, options, key)
        losses = {"loss": (weights_BT * losses_BT).sum()}
        if router is not None:
            losses |= {"router_balance": router[0] / parts, "router_z": router[1] / parts}
            total += config.training.router_balance_loss * losses["router_balance"]
            total += config.training.router_z_loss * losses["router_z"]
        return total, losses

    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        grads, losses = gradient(model, batch, weights_BT, key)
        return tokens, losses, grads

    def split(a_BT: Array) -> Array:
        # Rows a, a + A, a + 2A ... go to part a: each device then keeps the rows that it has.
        return jnp.moveaxis(a_BT.reshape(a_BT.shape[0] // parts, parts, *a_BT.shape[1:]), 1, 0)

    def add(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        part, weights, number = inputs
        grads, losses = gradient(model, part, weights, None if key is None else jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, carry, (losses, grads)), None

    names = ["loss", "router_balance", "router_z"] if config.model.n_experts else ["loss"]
    start = ({name: jnp.zeros(()) for name in names}, jax.tree.map(jnp.zeros_like, model))
    inputs = (jax.tree.map(split, batch), split(weights_BT), jnp.arange(parts))
    (losses, grads), _ = jax.lax.scan(add, start, inputs)
    return tokens, losses, grads


def make_train_step(config: TrainConfig) -> jax.stages.Wrapped:
    """The jitted step, (state, batch) -> (state, metrics), which donates the state. An update that is not finite, in
    loss or gradient, is not applied: only `step` moves on. Dropout draws from (seed, step), as a resumed run does."""
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    rate, decay = learning_rate(config.optimizer, config.training.steps), config.optimizer.ema_decay

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.training.seed), state.step) if config.model.dropout else None
        model = state.raw_model or state.model
        tokens, losses, grads = _gradients(model, batch, config, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(losses["loss"]) & jnp.isfinite(norm)
        updates, new_optimizer = optimizer.update(grads, state.optimizer, model)
        new_model = optax.apply_updates(model, updates)
        updated = TrainState(state.step, new_model, new_optimizer, None)
        if state.raw_model:
            average = jax.tree.map(lambda average, p: decay * average + (1 - decay) * p, state.model, new_model)
            updated = updated._replace(model=average, raw_model=new_model)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        now = rate(state.optimizer[-1].count)  # less than the step after skipped updates
        metrics = losses | {"grad_norm": norm, "learning_rate": now, "tokens": tokens, "finite": finite}
        return kept._replace(step=state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=2)
def eval_step(model: Transformer, batch: Batch, options: LossOptions) -> Array:
    """The sum of the negative log-likelihoods of each row, float32 [B], in nats."""
    _, losses_BT, _ = batch_loss(model, batch, jnp.zeros(batch.labels.shape), options)
    return losses_BT.sum(-1)
