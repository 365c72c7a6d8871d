"""How far a long job is: a bar that moves on a terminal, plain lines elsewhere."""

import contextlib

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on in silence when the reader (`| head`) has gone: what counts is in files."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()  # what is printed from now on goes nowhere; leaving is left out


class Bar(Progress):
    """A context manager that shows how many of `total` steps, requests ... are done, with figures beside it."""

    def __init__(self, what: str, total: int, done: int, *, stderr: bool = False) -> None:
        columns = TextColumn(what), BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[figures]}")
        console = _Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
        super().__init__(*columns, console=console, disable=not console.is_terminal, expand=True)
        self.add_task(what, total=total, completed=done, figures="")

    def show(self, done: int, figures: str, *, due: bool) -> None:
        """Show how far it is; where there is no terminal, in a line, if that is `due`."""
        (task,) = self.tasks
        self.update(task.id, completed=done, figures=figures)
        if due and self.disable:
            self.console.print(f"{task.description} {done}/{task.total}  {figures}")
