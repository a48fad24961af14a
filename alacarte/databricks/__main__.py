"""python -m alacarte.databricks stage | run | settle | explain"""

import sys

from alacarte.databricks.submit import main

sys.exit(main(sys.argv[1:]))
