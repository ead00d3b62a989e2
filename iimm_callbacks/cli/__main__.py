"""`python -m iimm_callbacks.cli`: `iimm`, for launchers that start a module on each rank."""

from . import main

if __name__ == "__main__":
    main()
