"""Opens archived tables with another engine and prints each row as the tests write it.

Usage: reader.py FOLDER [deltalake|polars|duckdbVERSION [COLUMN,...]]. One line a row: time in microseconds, texts as JSON, doubles by
their bits.
"""

import json
import struct
import sys

import pyarrow
from deltalake import DeltaTable


def cell(value, column_type):
    if value is None:
        return "null"
    if pyarrow.types.is_floating(column_type):
        return struct.pack(">d", value).hex()
    return json.dumps(value, ensure_ascii=True)


table = DeltaTable(sys.argv[1])
protocol = table.protocol()
assert (protocol.min_reader_version, protocol.min_writer_version) == (1, 2), protocol
engine = sys.argv[2] if len(sys.argv) > 2 else "deltalake"
if engine == "deltalake":
    rows = pyarrow.table(table.to_pyarrow_table())
elif engine == "polars":
    import polars

    rows = polars.scan_delta(sys.argv[1]).collect().to_arrow()
else:
    import duckdb

    wanted = engine.removeprefix("duckdb")
    assert duckdb.__version__.startswith(f"{wanted}." if wanted else ""), duckdb.__version__
    # Without its delta extension, which is fetched from the network: the files that the log names.
    session = duckdb.connect()
    session.execute("set TimeZone = 'UTC'")
    files = table.file_uris()
    rows = pyarrow.table({})
    if files:
        # Files may be older than a column.
        query = "select * from read_parquet(?, union_by_name = true)"
        rows = session.sql(query, params=[files]).to_arrow_table()
if len(sys.argv) > 3:
    rows = rows.select(sys.argv[3].split(","))
columns = []
for field in rows.schema:
    column = rows.column(field.name)
    if pyarrow.types.is_timestamp(field.type):
        assert field.type.unit == "us" and field.type.tz == "UTC", field.type
        column = column.cast(pyarrow.int64())
    columns.append([cell(value, column.type) for value in column.to_pylist()])
for row in zip(*columns):
    print("|".join(row))
