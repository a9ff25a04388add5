"""`python -m qwlora` is the command line."""

from qwlora.cli.main import main

if __name__ == "__main__":
    main()
