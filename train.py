"""Train a GPT: `python train.py [CONFIG] [--section.field VALUE ...]`; without arguments it trains configs/tiny.py."""

from jaxgpt.cli import dispatch
from jaxgpt.errors import run_command

if __name__ == "__main__":
    run_command(lambda arguments: dispatch(["train", *arguments], "train.py"))
