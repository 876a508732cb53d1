"""`python -m llmc.cli`, for where the script `llmc` is not on the path."""

import sys

from llmc.cli import main

sys.exit(main())
