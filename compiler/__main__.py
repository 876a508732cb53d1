"""`python -m llmc` and the script `llmc`: the command line, imported where Ctrl-C is understood already."""

from __future__ import annotations

import sys


def main() -> int:
    try:
        from llmc.cli import main

        return main()
    except KeyboardInterrupt:
        print("llmc: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
