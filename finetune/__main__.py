"""`python -m finetune` is the command `finetune`."""

import sys

from finetune.cli.main import main

sys.exit(main())
