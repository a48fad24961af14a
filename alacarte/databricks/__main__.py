"""python -m alacarte.databricks stage | run | settle"""

import sys

from alacarte.databricks.submit import main

sys.exit(main(sys.argv[1:]))
