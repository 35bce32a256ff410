"""Runs commands of this project one after the other, with small stand-ins, in each process.

    python dealt_commands.py COMMANDS.json      [["sample", "run", "--n", "3"], …]

What a grid is drawn of lies beside it afterwards, as OUT.pt; what each process printed is in
said.RANK, what it had to do in done.RANK.
"""

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from engine import cli, dealing, domain_classifier, inception, pictures, plots

RECIPE = {**domain_classifier.RECIPE, "widths": (8, 8, 16), "epochs": 1, "batch": 16}


class Tiny(torch.nn.Module):
    """In Inception's place."""

    def forward(self, pixels):
        flat = pixels.flatten(1).float()
        return flat[:, :4], flat[:, :6].sin()


def grid(images, path):
    torch.save(images, f"{path}.pt")
    return pictures.grid(images, path)


def carry_out(commands: list[list[str]]) -> list[int]:
    """Exit codes. Every piece of work is noted in done.RANK."""
    rank = int(os.environ.get("RANK", "0"))

    def deal(processes, count, work, really=dealing.deal):
        def noted(mine):
            with open(f"done.{rank}", "a") as file:
                file.write(f"{list(mine)} of {count}\n")
            return work(mine)

        return really(processes, count, noted)

    codes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domain_classifier, "RECIPE", RECIPE)
        patch.setattr(inception, "load", lambda path: Tiny())
        patch.setattr(plots, "grid", grid)
        patch.setattr(dealing, "deal", deal)
        for name in ("scores", "scoring"):
            patch.setattr(importlib.import_module(f"engine.{name}"), "deal", deal)
        for name, *args in commands:
            said = io.StringIO()
            main = importlib.import_module(f"engine.{name}").command
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                codes.append(cli.main(main, args))
            with open(f"said.{rank}", "a") as file:
                file.write(said.getvalue())
    return codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(max(carry_out(json.loads(Path(sys.argv[1]).read_text()))))
