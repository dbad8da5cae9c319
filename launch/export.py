"""Run the command of dist_vasp/commands/export.py under a launcher, or by itself."""

from dist_vasp.commands.program import run_script

if __name__ == "__main__":
    run_script("export")  # imports the command, and answers Ctrl-C meanwhile
else:
    from dist_vasp.commands.export import main as main
