"""`python -m headfold` is the `headfold` command."""

from headfold.cli import main

main()
