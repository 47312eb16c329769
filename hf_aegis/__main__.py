"""`python -m hf_aegis` is `hf-aegis`."""

import sys

from hf_aegis.cli import main


sys.exit(main())
