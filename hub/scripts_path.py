"""Makes scripts/coatnet_train importable; the commands of hub/ import this first."""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / 'scripts'))
