"""Run the command of dist_vasp/commands/doctor.py under a launcher, or by itself."""

from dist_vasp.commands.program import run_script

if __name__ == "__main__":
    run_script("doctor")  # imports the command, and answers Ctrl-C meanwhile
else:
    from dist_vasp.commands.doctor import main as main
