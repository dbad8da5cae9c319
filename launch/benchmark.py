"""Run the command of dist_vasp/commands/benchmark.py under a launcher, or by itself."""

from dist_vasp.commands.benchmark import main
from dist_vasp.commands.ending import run

if __name__ == "__main__":
    run(main)
