"""`python -m support.door ARGUMENTS`: metaseq-api-local as it is, but for ranks that are dummies."""

from __future__ import annotations

import importlib
import os
import sys

if __name__ == "__main__":
    # by name at run time: a door is a leaf that nothing imports
    door = importlib.import_module("metaseq_api.cli.interactive_hosted")
    sys.exit(door.main(sys.argv[1:], host_module=os.environ.get("DUMMY_HOST", "support.dummy_host")))
