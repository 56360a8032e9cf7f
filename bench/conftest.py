"""The benchmarks import each other by plain names, as the scripts in this folder do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
