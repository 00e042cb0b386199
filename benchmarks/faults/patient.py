"""mgpu without back-off and budget of restarts: `python -P patient.py ARGUMENTS`.

The program is mgpu's own; a life of five hundred crashes would take it hours, and its budget would end it before.
"""

from __future__ import annotations

from mgpu.__main__ import main
from mgpu.running import life

if __name__ == "__main__":
    vars(life).update(HEALTHY_S=0.0, delay_s=lambda _: 0.0)
    main()
