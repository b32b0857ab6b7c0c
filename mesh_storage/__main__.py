"""Entry point of `python -m mesh_storage`: runs the command line."""

import sys

from mesh_storage.cli import main

sys.exit(main())
