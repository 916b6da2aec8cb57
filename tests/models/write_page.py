"""Write docs/models.md."""

from outcomes import PAGE, outcome, page
from table import NAMES

PAGE.write_text(page({name: outcome(name)[0] for name in NAMES}), encoding="utf-8")
