"""python -m dist_vasp COMMAND ...: the program dist-vasp."""

from dist_vasp.commands.program import main

main()
