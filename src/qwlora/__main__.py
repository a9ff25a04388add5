"""Runs the command line: `python -m qwlora`."""

from qwlora.cli.main import main

if __name__ == "__main__":
    main()
