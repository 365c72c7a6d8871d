"""Generate text: `python generate.py --checkpoint runs/tiny --prompt "def read_lines("`."""

from jaxgpt.cli import dispatch
from jaxgpt.errors import run_command

if __name__ == "__main__":
    run_command(lambda arguments: dispatch(["generate", *arguments], "generate.py"))
