"""Run the command of dist_vasp/commands/report.py under a launcher, or by itself."""

from dist_vasp.commands.ending import run
from dist_vasp.commands.report import main

if __name__ == "__main__":
    run(main)
