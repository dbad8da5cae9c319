"""Run the command of dist_vasp/commands/plan.py under a launcher, or by itself."""

from dist_vasp.commands.ending import run
from dist_vasp.commands.plan import main

if __name__ == "__main__":
    run(main)
