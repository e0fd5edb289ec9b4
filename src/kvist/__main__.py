"""`python -m kvist`."""

from kvist.cli import main

if __name__ == "__main__":
    main()
