"""`python -m simclr_fast` and `torchrun -m simclr_fast` are `simclr-fast`."""

import sys


def main() -> int:
    from simclr_fast.commands.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
