"""`python -m edgecomp` is the same as `edgecomp`."""

from edgecomp.cli import main

if __name__ == "__main__":
    main()
