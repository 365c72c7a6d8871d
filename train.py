"""Train a GPT: `python train.py [CONFIG] [--section.field VALUE ...]`; without arguments it trains configs/tiny.py."""

from jaxgpt.cli import train
from jaxgpt.errors import run_command

if __name__ == "__main__":
    run_command(train)
