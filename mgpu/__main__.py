"""`python -m mgpu`."""

from mgpu.cli.main import run_main

if __name__ == "__main__":
    run_main()
