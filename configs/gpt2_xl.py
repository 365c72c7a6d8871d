"""GPT-2 XL, 1.56 B parameters: parameters and optimizer state are cut over all devices."""

from dataclasses import replace

from jaxgpt.config import MeshConfig, TrainConfig, load_preset


def config() -> TrainConfig:
    small = load_preset("configs/gpt2_124m.py")
    model = replace(small.model, n_layers=48, d_model=1600, n_heads=25, remat="full")
    training = replace(small.training, batch_size=512, accumulation_steps=4)
    optimizer, mesh = replace(small.optimizer, peak_lr=2e-4), MeshConfig(data=1, fsdp=-1)
    return replace(small, name="gpt2_xl", model=model, optimizer=optimizer, training=training, mesh=mesh)
