"""A table of the output log as programs see it that are not ours: python tables.py FOLDER

FOLDER is that of the table `outcomes`. Prints one line of JSON: what each reader finds in it.
pipelines/analytics/tests/readers.rs says what that must be.
"""

import json
import pathlib
import sys

import duckdb
import duckdb_extension_delta
import polars


def by_duckdb(folder):
    connection = duckdb.connect(config={"threads": 2})
    extension = pathlib.Path(duckdb_extension_delta.__file__).parent / f"extensions/v{duckdb.__version__}"
    connection.load_extension(str(extension / "delta.duckdb_extension"))
    whole = """SELECT count(*), count(DISTINCT request_id), sum(billed_nano_usd), sum(attempts), count(ttft_us),
        epoch_us(min(ended_at)), epoch_us(max(ended_at)), min(tenant), max(request_id) FROM delta_scan(?)"""
    days = "SELECT CAST(date AS VARCHAR), count(*), sum(input_tokens) FROM delta_scan(?) GROUP BY date ORDER BY date"
    # By what the log says of files: their day, and the bounds of a column.
    last = """SELECT count(*), sum(list_nano_usd) FROM delta_scan(?)
        WHERE date = (SELECT max(date) FROM delta_scan(?)) AND tenant = 'tenant-003'"""
    ask = lambda sql, count=1: [list(row) for row in connection.execute(sql, [folder] * count).fetchall()]
    return [ask(whole)[0], ask(days), ask(last, 2)[0]]


def by_polars(folder):
    table, column = polars.scan_delta(folder), polars.col
    whole = table.select(
        polars.len(), column("request_id").n_unique().alias("requests"), column("billed_nano_usd").sum(),
        column("attempts").cast(polars.Int64).sum(), column("ttft_us").count(),
        column("ended_at").min().dt.epoch("us").alias("first"), column("ended_at").max().dt.epoch("us").alias("last"),
        column("tenant").min(), column("request_id").max().alias("id"))
    days = table.group_by("date").agg(polars.len(), column("input_tokens").sum()).sort("date")
    day = table.select(column("date").max()).collect().item()
    last = table.filter((column("date") == day) & (column("tenant") == "tenant-003")).select(
        polars.len(), column("list_nano_usd").sum())
    rows = lambda frame: [list(row) for row in frame.collect().rows()]
    return [rows(whole)[0], [[str(date), *rest] for date, *rest in rows(days)], rows(last)[0]]


def main(folder):
    print(json.dumps({"duckdb": by_duckdb(folder), "polars": by_polars(folder)}))


main(*sys.argv[1:])
