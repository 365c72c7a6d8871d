"""GPT-2 XL, 1.56 B parameters: parameters and optimizer state are cut over all devices."""

from jaxgpt.config import (
    CheckpointConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
    TrainingConfig,
)


def config() -> TrainConfig:
    return TrainConfig(
        name="gpt2_xl",
        model=ModelConfig(n_layers=48, d_model=1600, n_heads=25, context_length=1024, dtype="bfloat16", remat="full"),
        tokenizer=TokenizerConfig(vocab_size=50257),
        optimizer=OptimizerConfig(peak_lr=2e-4, warmup_steps=2000),
        training=TrainingConfig(steps=600_000, batch_size=512, accumulation_steps=4, eval_every=1000),
        checkpoint=CheckpointConfig(every=1000, keep_every=50_000),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
