"""`python -m multiverse_gateway` is the command `multiverse-gateway`."""

from multiverse_gateway.cli import main

if __name__ == "__main__":
    main(prog_name="multiverse-gateway")
