"""Run the command of dist_vasp/commands/benchmark.py under a launcher, or by itself."""

from dist_vasp.commands.program import run_script

if __name__ == "__main__":
    run_script("benchmark")  # imports the command, and answers Ctrl-C meanwhile
else:
    from dist_vasp.commands.benchmark import main as main
