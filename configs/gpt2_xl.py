"""GPT-2 XL, 1.56 B parameters: parameters and optimizer state are cut over all devices."""

import jaxgpt.config as c


def config() -> c.TrainConfig:
    return c.TrainConfig(
        name="gpt2_xl",
        model=c.ModelConfig(n_layers=48, d_model=1600, n_heads=25, context_length=1024, dtype="bfloat16", remat="full"),
        tokenizer=c.TokenizerConfig(vocab_size=50257),
        optimizer=c.OptimizerConfig(peak_lr=2e-4, warmup_steps=2000),
        training=c.TrainingConfig(steps=600_000, batch_size=512, accumulation_steps=4, eval_every=1000),
        checkpoint=c.CheckpointConfig(every=1000, keep_every=50_000),
        mesh=c.MeshConfig(data=1, fsdp=-1),
    )
