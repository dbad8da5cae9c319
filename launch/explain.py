"""Run the command of dist_vasp/commands/explain.py by itself."""

from dist_vasp.commands.ending import run
from dist_vasp.commands.explain import main

if __name__ == "__main__":
    run(main)
