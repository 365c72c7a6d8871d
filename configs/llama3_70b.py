"""The shape of Llama 3 70B (arXiv:2407.21783, table 3): 70.6 B parameters over fsdp and tensor."""

from dataclasses import replace

from jaxgpt.config import MeshConfig, TrainConfig, load_preset


def config() -> TrainConfig:
    small = load_preset("configs/llama3_8b.py")
    model = replace(small.model, n_layers=80, d_model=8192, n_heads=64, d_ff=28672)
    optimizer, training = replace(small.optimizer, peak_lr=1.5e-4), replace(small.training, batch_size=1024)
    mesh = MeshConfig(data=1, fsdp=-1, tensor=8)
    return replace(small, name="llama3_70b", model=model, optimizer=optimizer, training=training, mesh=mesh)
