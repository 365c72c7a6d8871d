"""Generate text: `python generate.py --checkpoint runs/tiny --prompt "def read_lines("`."""

from jaxgpt.cli import generate
from jaxgpt.errors import run_command

if __name__ == "__main__":
    run_command(generate)
