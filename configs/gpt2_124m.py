"""GPT-2 small, 124 M parameters, as nanoGPT trains it: half a million tokens a step, 300 billion in all.

Give it text with --data.paths, or nanoGPT's tokens with --data.paths and --tokenizer.path.
"""

from jaxgpt.config import CheckpointConfig, ModelConfig, OptimizerConfig, TokenizerConfig, TrainConfig, TrainingConfig


def config() -> TrainConfig:
    return TrainConfig(
        name="gpt2_124m",
        model=ModelConfig(n_layers=12, d_model=768, n_heads=12, context_length=1024, dtype="bfloat16", remat="dots"),
        tokenizer=TokenizerConfig(vocab_size=50257),
        optimizer=OptimizerConfig(peak_lr=6e-4, warmup_steps=2000),
        training=TrainingConfig(steps=600_000, batch_size=480, accumulation_steps=10, eval_every=1000, eval_batches=20),
        checkpoint=CheckpointConfig(every=1000, keep_every=50_000),
    )
