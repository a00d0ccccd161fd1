"""`python -m tscnc_tf`: the command `tscnc`."""

from tscnc_cli import main

if __name__ == "__main__":
    main(prog_name="tscnc")
