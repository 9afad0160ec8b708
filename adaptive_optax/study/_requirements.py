"""Names a missing package before the study's modules fail to import it. Imported first."""

from adaptive_optax._core.extras import require

require("adaptive_optax.study", "study", "filelock", "jinja2", "matplotlib", "pandas", "rich", "scipy")
