"""Answers binned queries with DuckDB: a JSON document a line in, one out. Times are seconds; the process's own start and the
way of the answers to the bench are not in them.
"""

import json
import sys
import time

import duckdb

SHARES = """
with counts as materialized (
    select feature, epoch_us(created_at) // {width} * {width} as bin, bin_id, sum(bin_count)::bigint as n
      from read_parquet($files)
     where space = $space and name = $name and version = $version
       and created_at >= make_timestamptz({start}) and created_at < make_timestamptz({end})
     group by all)
select feature, bin, bin_id, n / sum(n) over (partition by feature, bin) as share from counts
union all
select feature, null, bin_id, sum(n) / sum(sum(n)) over (partition by feature) from counts group by feature, bin_id
"""

session, answer = None, None
for line in sys.stdin:
    request = json.loads(line)
    match request["do"]:
        case "version":
            said = duckdb.__version__
        case "open":
            start = time.perf_counter()
            session = duckdb.connect(":memory:", config={"threads": 2})
            session.execute("set parquet_metadata_cache = true")
            said = time.perf_counter() - start
        case "run":
            sql = SHARES.format(width=request["width"], start=request["start"], end=request["end"])
            names = {key: request[key] for key in ("files", "space", "name", "version")}
            start = time.perf_counter()
            answer = session.sql(sql, params=names).to_arrow_table()
            said = time.perf_counter() - start
        case "answer":
            said = [list(row.values()) for row in answer.to_pylist()]
        case "close":
            session.close()
            session, said = None, None
    print(json.dumps(said), flush=True)
