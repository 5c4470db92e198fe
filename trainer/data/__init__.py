"""Data: corpus -> tokens -> order -> batches. Loads torch only for batches."""

from trainer.data.prepare import prepare as prepare
from trainer.data.sources import Data as Data
from trainer.data.sources import open_data as open_data
from trainer.data.sources import summary as summary
from trainer.data.table import Table as Table
from trainer.data.table import open_table as open_table
from trainer.data.table import verify as verify
