"""`python -m bnlora` is the command `bnlora`."""

from bnlora.app.cli import main

if __name__ == "__main__":
    main()
