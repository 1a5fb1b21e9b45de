"""`python -m nybble`."""

from nybble.cli import main

main()
