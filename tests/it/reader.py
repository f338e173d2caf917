"""Opens archived tables with Python's deltalake and prints each row as the tests write it.

Usage: reader.py FOLDER. One line a row: time in microseconds, texts as JSON, doubles by their bits.
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
rows = pyarrow.table(table.to_pyarrow_table())
columns = []
for field in rows.schema:
    column = rows.column(field.name)
    if pyarrow.types.is_timestamp(field.type):
        assert field.type.unit == "us" and field.type.tz == "UTC", field.type
        column = column.cast(pyarrow.int64())
    columns.append([cell(value, column.type) for value in column.to_pylist()])
for row in zip(*columns):
    print("|".join(row))
