"""Says which package is missing before the study's modules fail to find it. Imported first."""

from adaptive_optax._extras import require

require("adaptive_optax.study", "study", "filelock", "matplotlib", "pandas", "rich", "scipy")
