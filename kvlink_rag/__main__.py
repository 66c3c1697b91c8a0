"""`python -m kvlink_rag`: the command line."""

import sys

from kvlink_rag.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
