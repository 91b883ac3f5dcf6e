"""Write-behind: rows are taken by Redis now and written to SQL in batches soon, each exactly once.

``buffer`` holds them, ``rows`` checks and packs them, ``flush`` moves them, ``position`` decides what is applied
already, ``merge`` what a batch becomes, ``sql_sink`` writes. Knows no Celery: ``petiole.tasks`` runs the flush.
"""

from .buffer import Buffer
from .flush import Flushed, Flusher, Sink
from .positions import positions_table
from .sql_sink import SqlSink

__all__ = ["Buffer", "Flushed", "Flusher", "Sink", "SqlSink", "positions_table"]
