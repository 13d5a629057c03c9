"""`python -m jq`."""

import sys

from jq.cli import main

sys.exit(main())
