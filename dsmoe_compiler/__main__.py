"""`python -m dsmoe_compiler` is `dsmoe`."""

from dsmoe_compiler.cli import main

if __name__ == "__main__":
    main(prog_name="dsmoe")
