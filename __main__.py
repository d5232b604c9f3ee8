"""`python -m diffusette` is the command `diffusette`."""

from .cli import main

if __name__ == "__main__":
    main()
