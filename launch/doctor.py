"""Run the command of dist_vasp/commands/doctor.py under a launcher, or by itself."""

import sys

try:
    from dist_vasp.commands.doctor import main
    from dist_vasp.commands.ending import run
except ImportError as missing:
    print(f"error    imports  {missing}", file=sys.stderr)
    print("         -> pip install -c constraints.txt -e .", file=sys.stderr)
    sys.exit(1)

if __name__ == "__main__":
    run(main)
