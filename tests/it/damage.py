"""Damages a Delta table as a person might: damage.py TABLE delete|double|change METRIC

One row of that metric is deleted, written once more, or gets the next greater double as its value."""

import math
import sys

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, write_deltalake

path, action, metric = sys.argv[1:]
table = DeltaTable(path)
# Filtered after the cast: a file that was damaged before has texts as views, which no filter knows.
rows = table.to_pyarrow_table().cast(
    pa.schema(
        [
            pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
            pa.field("space", pa.string(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
            pa.field("version", pa.string(), nullable=False),
            pa.field("metric", pa.string(), nullable=False),
            pa.field("value", pa.float64()),
        ]
    )
).filter(pc.field("metric") == metric)
assert rows.num_rows == 1, rows.num_rows
if action in ("delete", "change"):
    table.delete(f"metric = '{metric}'")
if action == "change":
    value = rows.column("value")[0].as_py()
    rows = rows.set_column(5, rows.schema.field("value"), pa.array([math.nextafter(value, math.inf)]))
if action in ("double", "change"):
    write_deltalake(path, rows, mode="append")
