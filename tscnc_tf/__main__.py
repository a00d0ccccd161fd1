"""`python -m tscnc_tf`: the command `tscnc`."""

from tscnc_cli import main

main(prog_name="tscnc")
