"""`python -m nudging`."""

from nudging.cli.main import main

main(prog_name="nudging")
