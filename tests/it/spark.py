"""Opens archived tables with Spark, with its vectorized reader and without, and prints each row as the tests write it.

Usage: spark.py SNIPPET FOLDER... The snippet, which is the documentation's, makes the session. Before the rows of a table comes a line
`# FOLDER MODE`. A row is a line: time in microseconds, texts as JSON, doubles by their bits.
"""

import json
import struct
import sys
from pathlib import Path

from deltalake import DeltaTable
from pyspark.sql import SparkSession


def cell(value, column_type):
    if value is None:
        return "null"
    if column_type == "double":
        return struct.pack(">d", value).hex()
    return json.dumps(value, ensure_ascii=True)


settings = {
    "spark.ui.enabled": "false",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.sql.shuffle.partitions": "1",
}
builder = SparkSession.builder.master("local[1]")
for name, value in settings.items():
    builder = builder.config(name, value)
spark = builder.getOrCreate()
exec(compile(Path(sys.argv[1]).read_text(), "docs/archive.md", "exec"))
# Spark 3 wants to be told before it reads times before 1900: older versions of Spark wrote another calendar.
spark.conf.set("spark.sql.parquet.datetimeRebaseModeInRead", "CORRECTED")
for folder in sys.argv[2:]:
    files = DeltaTable(folder).file_uris()
    for mode in ["vectorized", "plain"]:
        print(f"# {folder} {mode}")
        if not files:
            continue
        spark.conf.set("spark.sql.parquet.enableVectorizedReader", str(mode == "vectorized").lower())
        rows = spark.read.parquet(*files)
        types = dict(rows.dtypes)
        shown = [f"unix_micros(`{name}`) as `{name}`" if types[name] == "timestamp" else f"`{name}`" for name in rows.columns]
        rows = rows.selectExpr(*shown)
        plan = rows._jdf.queryExecution().executedPlan().toString()
        assert ("Batched: true" in plan) == (mode == "vectorized"), plan
        for row in rows.collect():
            print("|".join(cell(value, types[name]) for name, value in zip(rows.columns, row)))
