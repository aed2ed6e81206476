"""`python -m gendr` is the command `gendr`."""

import sys

try:
    from .cli import main

    code = main()
except KeyboardInterrupt:  # while torch was still being imported
    code = 130
sys.exit(code)
