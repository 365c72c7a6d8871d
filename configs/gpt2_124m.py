"""GPT-2 small, 124 M parameters, as nanoGPT trains it: half a million tokens a step, 300 billion in all.

Give it your text with --data.paths; without, it would see Python's standard library thousands of times."""

import jaxgpt.config as c


def config() -> c.TrainConfig:
    return c.TrainConfig(
        name="gpt2_124m",
        model=c.ModelConfig(n_layers=12, d_model=768, n_heads=12, context_length=1024, dtype="bfloat16", remat="dots"),
        tokenizer=c.TokenizerConfig(vocab_size=50257),
        optimizer=c.OptimizerConfig(peak_lr=6e-4, warmup_steps=2000),
        training=c.TrainingConfig(steps=600_000, batch_size=480, accumulation_steps=10, eval_every=1000),
        checkpoint=c.CheckpointConfig(every=1000, keep_every=50_000),
    )
