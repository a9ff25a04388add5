"""Runs the command line: `python -m qwlora`."""

import os
import sys

# `python -m` puts the current folder first on sys.path. Next to a stranger's recipe, it may hold a
# module with the name of an optional package.
if sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

from qwlora.cli.main import main

if __name__ == "__main__":
    main()
