"""`python -m cdpo_ray` is `cdpo`."""

import sys

from cdpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main())
