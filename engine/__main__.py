"""`python -m nudging`."""

from nudging.cli import main

main(prog_name="nudging")
